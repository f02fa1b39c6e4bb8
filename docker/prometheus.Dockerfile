# Prometheus for the aggregator's profile `monitoring`, from Debian's package: it builds wherever the
# other images do. Context: deploy/server.

ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
RUN apt-get update -q && apt-get install -q -y --no-install-recommends prometheus \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
    && install -d -o 10001 -g 10001 -m 0700 /prometheus
COPY monitoring /etc/fedqlora
RUN promtool check config /etc/fedqlora/prometheus.yml
USER 10001:10001
ENTRYPOINT ["prometheus", "--config.file=/etc/fedqlora/prometheus.yml", "--storage.tsdb.path=/prometheus"]
CMD ["--storage.tsdb.retention.time=90d", "--web.listen-address=0.0.0.0:9090"]
