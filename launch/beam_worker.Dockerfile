# The image that workers of Dataflow, Flink and Spark run in: Beam's own, with this package and what it needs.
#
#   docker build -f launch/beam_worker.Dockerfile -t IMAGE . && docker push IMAGE
#   docker build --build-arg EXTRAS=pipeline,separate,llm,cuda --build-arg TORCH_INDEX=https://pypi.org/simple ... # GPU
#
# Python and Beam must be those of the machine that starts the build (constraints-py3.11.txt).
FROM apache/beam_python3.11_sdk:2.77.0

ARG EXTRAS=pipeline,separate,llm
# CPU builds of PyTorch satisfy the same pin and are some GB smaller.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
 && apt-get install --yes --no-install-recommends fluidsynth libsndfile1 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/subtractive-jax
COPY pyproject.toml README.md LICENSE constraints-py3.11.txt ./
COPY subtractive_jax subtractive_jax
COPY data_pipeline data_pipeline
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir -c constraints-py3.11.txt --extra-index-url "$TORCH_INDEX" \
      ".[$EXTRAS]" "apache-beam[gcp,aws]" \
 && pip check

# Workers start without launch/program.py, which says this elsewhere.
ENV TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0

# Models and a SoundFont may lie on a bucket: each worker process copies them once. Or put them into the image, at the
# path that the build is given:
#   COPY models /models

# The entry point is Beam's boot program, which also runs worker pools (--worker_pool).
