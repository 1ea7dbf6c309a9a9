# docker build -t dino .                                                                        for NVIDIA GPUs
# docker build -t dino --build-arg TORCH=https://download.pytorch.org/whl/cpu .                 for CPUs, 2 GB less
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" dino train data.root=images run.dir=runs/mine
FROM python:3.12-slim
ARG TORCH=https://pypi.org/simple
ARG VERSION=0.1.0.dev0
WORKDIR /opt/dino
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH" --extra-index-url https://pypi.org/simple torch torchvision
COPY dino dino
COPY configs configs
RUN SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION" pip install --no-cache-dir -c constraints.txt ".[export]"
RUN useradd --create-home dino && mkdir /work && chown dino /work
USER dino
WORKDIR /work
ENTRYPOINT ["dino"]
