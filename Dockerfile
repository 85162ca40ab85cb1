# Flyball with what it needs for Kafka and PostgreSQL. Plain Dockerfile syntax: BuildKit, the classic builder and buildah take it.
#
#   docker build -t flyball .
#   docker build -t flyball --build-arg PYTHON_IMAGE=registry.example.com/python:3.13-slim --build-arg PIP_INDEX_URL=https://pypi.example.com/simple .
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
# pip's own variables; they stay in this stage.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml requirements/dev.txt ./
# What Flyball stands on, in a layer of its own: a change of Flyball's code does not fetch it again. The versions are those of the tests.
RUN python -m venv /opt/flyball \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; print(*p['dependencies'], *e['kafka'], *e['postgres'], sep='\n')" > wanted.txt \
 && /opt/flyball/bin/pip install --quiet --constraint dev.txt --requirement wanted.txt
COPY . .
RUN /opt/flyball/bin/pip install --quiet --no-deps '.[kafka,postgres]' \
 && /opt/flyball/bin/pip check

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Flyball" \
      org.opencontainers.image.description="The governor for AI in production" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 flyball \
 && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --no-log-init --shell /usr/sbin/nologin flyball \
 && mkdir -m 0750 /data && chown 10001:10001 /data
COPY --from=build /opt/flyball /opt/flyball
# /data is the only folder that is written: the SQLite database and the key of hashes, where neither PostgreSQL nor FLYBALL_HASH_KEY is given.
ENV PATH=/opt/flyball/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 FLYBALL_DATA=/data
VOLUME /data
WORKDIR /data
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 4390
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('FLYBALL_PORT', '4390')), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
# In a container it must listen on FLYBALL_HOST=0.0.0.0 to be reached, which needs tokens.
ENTRYPOINT ["flyball"]
CMD ["run"]
