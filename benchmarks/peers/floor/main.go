// The floor: what Go and franz-go need for the path at the least.
//
//	floor -kafka HOST:PORT -topic TOPIC -destination URL
//
// The same as benchmarks/bare_pipeline.py: a handler reads the body, verifies GitHub's signature and waits for the
// producer; a consumer in the same process posts each record. It keeps no headers, creates no ids, and logs, counts,
// retries and bounds nothing; failed deliveries are lost.
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// The gateway's default for a destination.
const concurrency = 50

func main() {
	kafka := flag.String("kafka", "", "a broker")
	topic := flag.String("topic", "", "the topic of all events")
	destination := flag.String("destination", "", "where each event is posted to")
	secret := flag.String("secret", "", "GitHub's")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	producer, err := kgo.NewClient(
		kgo.SeedBrokers(*kafka),
		kgo.DefaultProduceTopic(*topic),
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.ProducerBatchCompression(kgo.ZstdCompression()),
		kgo.ProducerBatchMaxBytes(524_288),
		kgo.ProducerLinger(0),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer producer.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	http.Handle("POST /in/github", receive(producer, []byte(*secret)))
	go func() { log.Fatal(http.Serve(listener, nil)) }()
	fmt.Printf("{\"event\": \"listening\", \"ingress\": \"http://%s\"}\n", listener.Addr())
	if err := deliver(ctx, *kafka, *topic, *destination); err != nil {
		log.Fatal(err)
	}
}

func receive(producer *kgo.Client, secret []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mac := hmac.New(sha256.New, secret)
		mac.Write(body)
		signature := "sha256=" + hex.EncodeToString(mac.Sum(nil))
		if !hmac.Equal([]byte(signature), []byte(r.Header.Get("X-Hub-Signature-256"))) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if producer.ProduceSync(r.Context(), &kgo.Record{Value: body}).FirstErr() != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusAccepted)
	}
}

func deliver(ctx context.Context, kafka, topic, destination string) error {
	consumer, err := kgo.NewClient(
		kgo.SeedBrokers(kafka),
		kgo.ConsumeTopics(topic),
		kgo.ConsumerGroup("floor"),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxWait(100*time.Millisecond),
	)
	if err != nil {
		return err
	}
	defer consumer.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: concurrency}}
	slots := make(chan struct{}, concurrency)
	for {
		fetches := consumer.PollFetches(ctx)
		if ctx.Err() != nil {
			return nil
		}
		for _, record := range fetches.Records() {
			slots <- struct{}{}
			go func() {
				defer func() { <-slots }()
				post(client, destination, record.Value)
			}()
		}
	}
}

func post(client *http.Client, destination string, body []byte) {
	response, err := client.Post(destination, "application/json", bytes.NewReader(body))
	if err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, response.Body)
	_ = response.Body.Close()
}
