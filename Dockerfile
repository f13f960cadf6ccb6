# Everything of requirements.lock on Linux, for a user without rights; docs/platforms.md.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv \
    && useradd --create-home --uid 1000 assemble \
    && install --directory --owner=assemble --group=assemble /home/assemble/representation-assemble

# The folder exists, since the classic builder would make it for root.
USER assemble
WORKDIR /home/assemble/representation-assemble

# The packages first: they change less often than the code.
COPY --chown=assemble requirements.lock ./
RUN uv venv --quiet --python python3 .venv \
    && VIRTUAL_ENV="$PWD/.venv" uv pip sync --quiet --no-cache --compile-bytecode --require-hashes requirements.lock

COPY --chown=assemble . .
RUN make setup TORCH=cuda

ENV PATH="/home/assemble/representation-assemble/.venv/bin:$PATH"
CMD ["assemble", "--help"]
