# The image of kuberay/: Ray's own with this package and vLLM. Build and push it, and name it in the manifests.
#     docker build -t REGISTRY/mashup-learning:0.1.0 . && docker push REGISTRY/mashup-learning:0.1.0
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /home/ray/mashup-learning
COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users pipeline pipeline
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir '.[gpu,track]'

