"""The web page of app.py, with gradio. Only `layout` needs gradio."""
