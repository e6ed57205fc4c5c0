# The fine-tuning service on CPUs. See "Docker" in the README for how to build and run it.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# tini is the container's first process: it passes signals on and reaps what Ray's dead leave behind.
# The data directory belongs to the group root, which a --user that has no group given is in.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --gid 0 --home-dir /data --no-create-home finetuning \
    && install -d -m 770 -o finetuning -g root /data

WORKDIR /app

# The CPU build of PyTorch. Where this index cannot be reached, pip's own configuration decides.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt ./
RUN torch=$(grep -oE '^torch==[0-9.]+' requirements.txt) \
    && pip="pip install --no-cache-dir --root-user-action=ignore" \
    && { $pip --no-deps --retries 0 --timeout 10 --index-url "$TORCH_INDEX" "$torch" || $pip "$torch"; } \
    && $pip -r requirements.txt

# The code last: a change to it installs nothing anew.
COPY comps comps
COPY patches patches
RUN python -m compileall -q comps patches

# Without keys the service refuses to listen on this host, and says so: see FINETUNING_API_KEYS.
ENV FINETUNING_HOST=0.0.0.0 \
    FINETUNING_PORT=8015 \
    FINETUNING_DATA_DIR=/data \
    HOME=/data \
    HF_HOME=/data/huggingface \
    # A user id that /etc/passwd does not know has no name, and libraries ask for one.
    LOGNAME=finetuning \
    PYTHONUNBUFFERED=1

# A number, so that Kubernetes can tell that it is not root (runAsNonRoot).
USER 1000
VOLUME /data
EXPOSE 8015
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, http.client as http; \
    service = http.HTTPConnection('127.0.0.1', int(os.environ['FINETUNING_PORT']), timeout=4); \
    service.request('GET', '/v1/health_check'); \
    raise SystemExit(service.getresponse().status != 200)"]

# -s: it reaps also where it is not the first process after all (docker run --init, a pod's shared tree).
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "-m", "comps.finetuning"]
