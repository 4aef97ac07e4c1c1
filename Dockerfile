# The embedding service, in two targets: `cpu`, which a plain build gives, and `gpu`. Neither has torch.
#   docker build --tag mvmr .                    docker build --tag mvmr:gpu --target gpu .
# All is installed and compiled to bytecode here; at start nothing is built, and nothing is written, not even to /tmp.
# Bytecode is not checked against its sources' times: a layer rounds these, and half of it would be made anew each start.
ARG BASE=python:3.11-slim-bookworm

# The packages, in the versions of constraints.txt; wheels only, so no compiler is needed. This layer changes with them,
# not with each line of mvmr. pip works from outside: the environment has none. Left out: packages' own tests, and of
# pyarrow (a third of it all) the headers, Flight and its S3 client, for mvmr reads S3 by s3fs.
# hadolint ignore=DL3006
FROM ${BASE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python -m venv --without-pip /opt/mvmr \
    && python -c 'import tomllib; \
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > requirements.txt \
    && python -m pip --python /opt/mvmr/bin/python install --no-compile --only-binary :all: \
        --constraint constraints.txt --requirement requirements.txt \
    && find /opt/mvmr/lib -depth -type d \( -name tests -o -path '*/pyarrow/include' \) -exec rm -r {} + \
    && find /opt/mvmr/lib -path '*/pyarrow/*' \( -name '*_flight*.so*' -o -name '*_s3*.so*' \) -delete \
    && /opt/mvmr/bin/python -c 'import faiss, numpy.testing, pyarrow.dataset, pyarrow.fs, pyarrow.parquet' \
    && python -m compileall -q -f --invalidation-mode unchecked-hash /opt/mvmr/lib

# mvmr itself, laid out as it will lie over the packages: a new version of it is one small layer.
FROM packages AS application
RUN python -m venv tools && tools/bin/pip install --constraint constraints.txt setuptools
COPY README.md LICENSE ./
COPY mvmr mvmr/
COPY distill distill/
COPY export export/
COPY serve serve/
COPY app app/
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && python -m pip --python /opt/mvmr/bin/python install --no-compile --no-deps --no-index \
        --prefix /opt/application wheels/*.whl \
    && python -m compileall -q -f --invalidation-mode unchecked-hash \
        -s /opt/application -p /opt/mvmr /opt/application/lib

# What both targets share. The official Python image comes without bytecode of its standard library, which a read-only
# root would have compiled anew at every start.
# hadolint ignore=DL3006
FROM ${BASE} AS runtime
RUN python -m compileall -q -x 'site-packages|dist-packages|/(test|idlelib|lib2to3)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="mvmr" \
      org.opencontainers.image.description="Embeddings of images over HTTP, by a distilled student" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# onnxruntime reports its use to its maker unless it is told not to. HOME: no user of this image has one.
ENV PATH=/opt/mvmr/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HOME=/tmp \
    MVMR_CACHE=/tmp/mvmr \
    MVMR_BUNDLE=/bundle \
    MVMR_HOST=0.0.0.0 \
    MVMR_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-S", "-c", "\
import http.client, os, ssl, sys; \
probes = os.environ.get('MVMR_PROBE_PORT'); \
at = {'host': '127.0.0.1', 'port': int(probes or os.environ['MVMR_PORT']), 'timeout': 4}; \
secure = os.environ.get('MVMR_TLS_CERT') and not probes; \
tls = {'context': ssl._create_unverified_context()} if secure else None; \
service = http.client.HTTPSConnection(**at, **tls) if tls else http.client.HTTPConnection(**at); \
service.request('GET', '/healthz'); \
sys.exit(service.getresponse().status != 200)"]
ENTRYPOINT ["mvmr"]
CMD ["serve"]

# CUDA and cuDNN come as wheels beside onnxruntime-gpu: the same base, Python and lines as for `cpu`, and the versions
# that torch is tested with here; NVIDIA's own images bring another Python. The host's driver comes from the NVIDIA
# container toolkit. Built, and its libraries resolved, but never run on a GPU.
FROM packages AS gpu-packages
RUN python -m pip --python /opt/mvmr/bin/python uninstall --yes onnxruntime \
    && python -m pip --python /opt/mvmr/bin/python install --no-compile --only-binary :all: \
        --constraint constraints.txt \
        "onnxruntime-gpu[cuda,cudnn]==$(sed -n 's/^onnxruntime==//p' constraints.txt)" \
    && python -m compileall -q -f --invalidation-mode unchecked-hash /opt/mvmr/lib

FROM runtime AS gpu
ARG NVIDIA=/opt/mvmr/lib/python3.11/site-packages/nvidia
ENV MVMR_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=${NVIDIA}/cu13/lib:${NVIDIA}/cudnn/lib
COPY --from=gpu-packages /opt/mvmr /opt/mvmr
COPY --from=application /opt/application /opt/mvmr

FROM runtime AS cpu
COPY --from=packages /opt/mvmr /opt/mvmr
COPY --from=application /opt/application /opt/mvmr
