# sparsekit on a machine with CUDA: docker build -t sparsekit . ; docker run --gpus all -v $PWD:/data sparsekit fit --recipe /data/my.yaml
# Without a card it runs on the CPU. Models and data sets that are downloaded stay in /data/cache.
FROM python:3.11-slim

WORKDIR /opt/sparsekit
COPY . .
# constraints.txt has the tested versions; torch's index for another CUDA: --build-arg TORCH=https://download.pytorch.org/whl/cu128
ARG TORCH=https://pypi.org/simple
RUN pip install --no-cache-dir --constraint constraints.txt --index-url ${TORCH} --extra-index-url https://pypi.org/simple torch \
    && pip install --no-cache-dir --constraint constraints.txt '.[demo,pack,vision,sound]' \
    && for plugin in plugins/*; do pip install --no-cache-dir --no-deps "./$plugin"; done

WORKDIR /data
ENV HF_HOME=/data/cache
ENTRYPOINT ["sparsekit"]
CMD ["--help"]
