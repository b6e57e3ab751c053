"""The bare pipeline that the gateway is compared with: aiohttp and aiokafka on uvloop, as in their own examples.

    python -m benchmarks.bare_pipeline --kafka HOST:PORT --topic TOPIC [--destination URL]

A handler reads the body, verifies GitHub's signature and awaits the producer; with `--destination` a consumer in the
same process posts each record there. It keeps no headers, creates no ids, and logs, counts, retries and bounds nothing;
failed deliveries are lost. The producer's settings are the gateway's.
"""

import argparse
import asyncio
import hmac
import json
import signal

import uvloop
from aiohttp import ClientSession, TCPConnector, web
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.payload import SECRET

CONCURRENCY = 50  # The gateway's default for a destination.


def new_producer(servers: str) -> AIOKafkaProducer:
    return AIOKafkaProducer(
        bootstrap_servers=servers,
        acks="all",
        compression_type="zstd",
        max_batch_size=524_288,
        linger_ms=0,
    )


async def serve(servers: str, topic: str) -> tuple[web.AppRunner, AIOKafkaProducer]:
    producer = new_producer(servers)
    await producer.start()
    secret = SECRET.encode()

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        signature = "sha256=" + hmac.digest(secret, body, "sha256").hex()
        if not hmac.compare_digest(signature, request.headers.get("X-Hub-Signature-256", "")):
            return web.Response(status=401)
        await producer.send_and_wait(topic, body)
        return web.Response(status=202)

    application = web.Application()
    application.router.add_post("/in/github", receive)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(json.dumps({"event": "listening", "ingress": f"http://127.0.0.1:{runner.addresses[0][1]}"}), flush=True)
    return runner, producer


async def deliver(servers: str, topic: str, destination: str) -> None:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        group_id="bare",
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )
    await consumer.start()
    slots = asyncio.Semaphore(CONCURRENCY)
    headers = {"Content-Type": "application/json"}
    async with ClientSession(connector=TCPConnector(limit=0)) as session, asyncio.TaskGroup() as tasks:

        async def post(body: bytes) -> None:
            try:
                async with session.post(destination, data=body, headers=headers) as response:
                    await response.read()
            finally:
                slots.release()

        try:
            async for record in consumer:
                await slots.acquire()
                tasks.create_task(post(record.value))
        finally:
            await consumer.stop()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--destination")
    options = parser.parse_args()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    runner, producer = await serve(options.kafka, options.topic)
    async with asyncio.TaskGroup() as tasks:
        delivering = [deliver(options.kafka, options.topic, options.destination)] if options.destination else []
        running = [tasks.create_task(each) for each in delivering]
        await stopping.wait()
        for task in running:
            task.cancel()
    await runner.cleanup()
    await producer.stop()


if __name__ == "__main__":
    uvloop.run(main())
