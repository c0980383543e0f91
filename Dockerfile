# fairline with two-party private inference (SPU takes Python 3.11), for CPUs, in the versions of constraints.txt.
#   docker build -t fairline . && docker run --rm -v "$PWD:/work" --user "$(id -u)" fairline demo --out demo
FROM python:3.11-slim-bookworm AS build

# PyPI's builds of torch bring CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=hub,mpc,onnx

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt ./
RUN python -m venv /opt/fairline \
    && /opt/fairline/bin/pip install --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# The variable, unlike -c, also pins what the build of the wheel installs.
RUN PIP_CONSTRAINT=constraints.txt /opt/fairline/bin/pip install ".[$EXTRAS]" \
    && /opt/fairline/bin/pip check

FROM python:3.11-slim-bookworm

# SPU's OpenMP. Its version is Debian's to mend.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home fairline \
    && install --directory --owner=fairline /work
COPY --from=build /opt/fairline /opt/fairline
ENV PATH=/opt/fairline/bin:$PATH
USER 1000
WORKDIR /work
ENTRYPOINT ["fairline"]
CMD ["--help"]
