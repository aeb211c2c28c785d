"""The OpenAI-compatible server: handles to HTTP, and nothing else.

Two processes. The core (`core.py`) has the engine and decodes; the front (`app.py`) has the sockets. They talk over a
socket pair (`wire.py`, `link.py`), so that HTTP and decoding do not wait for one interpreter lock.
"""
