# The image that launch/gke.sh runs: this package and JAX for TPUs.
#
#   docker build -f launch/train.Dockerfile -t IMAGE . && docker push IMAGE
#   docker build --build-arg EXTRAS=cuda ...     # for GPUs
FROM python:3.12-slim

ARG EXTRAS=tpu

WORKDIR /opt/subtractive-jax
COPY pyproject.toml README.md LICENSE constraints-py3.12.txt ./
COPY subtractive_jax subtractive_jax
COPY data_pipeline data_pipeline
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir -c constraints-py3.12.txt ".[$EXTRAS]" gcsfs \
 && pip check
