"""The web page of app.py. Only `layout`, `events` and `server` need gradio."""
