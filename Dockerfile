# smtp-dup: one image for every role. `docker run ... smtp-dup` is `smtp-dup up`; compose.yaml runs the roles apart.
# docs/docker.md has the commands.

FROM python:3.12-slim AS build
WORKDIR /source
# The environment gets no pip of its own: nothing in the finished image installs anything.
RUN python -m venv --without-pip /opt/smtp-dup
COPY pyproject.toml README.md LICENSE.md ./
COPY relay relay
COPY workers workers
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip --python /opt/smtp-dup/bin/python --disable-pip-version-check install ".[embedded]"
# Half of it is debug symbols, and zstandard's second backend, which is for PyPy. Without binutils it is only larger.
RUN rm -f /opt/smtp-dup/lib/python3*/site-packages/zstandard/_cffi*.so \
    && if apt-get update -qq && apt-get install -qq --yes --no-install-recommends binutils; then \
         find /opt/smtp-dup -name '*.so' -exec strip --strip-unneeded {} +; \
       else echo "no binutils: the libraries keep their debug symbols"; fi

FROM python:3.12-slim
LABEL org.opencontainers.image.title="smtp-dup" \
      org.opencontainers.image.description="An SMTP relay that duplicates live mail: inline to a primary server, a durable copy for every backup" \
      org.opencontainers.image.licenses="MIT"
# A number that stays: the files in the volume belong to it, and Kubernetes' runAsNonRoot only believes numbers.
RUN groupadd --gid 2525 smtp-dup \
    && useradd --uid 2525 --gid 2525 --home-dir /var/lib/smtp-dup --no-create-home --shell /usr/sbin/nologin smtp-dup \
    && install -d -o 2525 -g 2525 -m 0750 /var/lib/smtp-dup \
    && install -d /app /etc/smtp-dup
COPY --from=build /opt/smtp-dup /opt/smtp-dup
COPY deploy/docker/defaults.toml /opt/smtp-dup/
COPY --chmod=0755 deploy/docker/health.py /usr/local/bin/smtp-dup-health
COPY --chmod=0755 deploy/docker/nc.py /usr/local/bin/nc
# Only where nobody says otherwise: a settings file, a variable or a flag wins over SMTP_DUP_DEFAULTS.
ENV PATH=/opt/smtp-dup/bin:$PATH \
    SMTP_DUP_DEFAULTS=/opt/smtp-dup/defaults.toml \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# settings.toml or GoSMTP-dup's config.yaml is looked for here, then in /etc/smtp-dup.
WORKDIR /app
USER 2525:2525
# The spool and the embedded Redis: what was promised to a client and is not delivered yet.
VOLUME /var/lib/smtp-dup
EXPOSE 2525
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["smtp-dup-health"]
ENTRYPOINT ["smtp-dup"]
CMD ["up"]
