# syntax=docker/dockerfile:1
# The server, with the model that is in the package. For a smaller image without CUDA, give PyTorch's index of CPU
# builds:  docker build --build-arg PIP_EXTRA_INDEX_URL=... --tag leapasr .
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=bind,target=/source,readwrite \
    pip install --no-cache-dir torch==2.13.0 && \
    pip install --no-cache-dir --constraint /source/requirements.txt "/source[serve]" && \
    useradd --create-home --uid 10001 leapasr

USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["leapasr"]
CMD ["serve", "--host", "0.0.0.0"]
