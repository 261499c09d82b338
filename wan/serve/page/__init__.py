"""The web page of app.py. Only `layout`, the events and `server` need gradio."""
