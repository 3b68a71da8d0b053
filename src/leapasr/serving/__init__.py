"""An HTTP server that speaks OpenAI's transcription API, and a page to try it with. Needs the extra ``serve``."""

from importlib.util import find_spec

missing = [name for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client") if find_spec(name) is None]
if missing:
    raise ImportError(f"the server needs {', '.join(missing)}: pip install 'leapasr[serve]'")
