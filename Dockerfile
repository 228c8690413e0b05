# The image of kuberay/: Ray's own with this package and vLLM. Build and push it, and name it in the manifests.
#     docker build -t REGISTRY/mashup-learning:0.1.0 . && docker push REGISTRY/mashup-learning:0.1.0
FROM rayproject/ray:2.60.0-py311-gpu
# CUDA 13 comes with the packages, and wants NVIDIA's driver 580 or newer: a node with an older one is not to start a container.
ENV NVIDIA_REQUIRE_CUDA="cuda>=13.0"
# Triton compiles a part of each kernel in C, against Python's headers.
RUN sudo apt-get update -qq && sudo apt-get install -y -qq --no-install-recommends gcc libc6-dev && \
    sudo rm -rf /var/lib/apt/lists/* && \
    test -e "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
WORKDIR /home/ray/mashup-learning
COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users pipeline pipeline
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir '.[gpu,quantize,track]'
