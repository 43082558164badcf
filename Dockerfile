# The command line on the CPU: docker run --rm -v "$PWD:/data" onnx-attnround in.onnx out.onnx
FROM python:3.12-slim AS build
COPY pyproject.toml README.md LICENSE /src/
COPY onnx_attnround /src/onnx_attnround
# A PyTorch without CUDA, and ONNX Runtime without it in place of the one that the package asks for.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch \
    && /opt/venv/bin/pip install --no-cache-dir /src \
    && /opt/venv/bin/pip uninstall --yes onnxruntime-gpu \
    && /opt/venv/bin/pip install --no-cache-dir --force-reinstall --no-deps onnxruntime

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home attnround
USER attnround
WORKDIR /data
ENTRYPOINT ["/opt/venv/bin/onnx-attnround"]
CMD ["--help"]
