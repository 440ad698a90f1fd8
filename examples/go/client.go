// An image becomes a typed answer, from Go: three calls, and an error that can be read.
//
//	client IMAGE [HOST:PORT]
//
// QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	pb "example.com/qwen3vlv1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const schema = `{
  "type": "object", "additionalProperties": false, "required": ["objects"],
  "properties": {"objects": {"type": "array", "items": {
    "type": "object", "additionalProperties": false,
    "required": ["position", "shape", "color", "size"],
    "properties": {
      "position": {"type": "string"}, "shape": {"type": "string"}, "color": {"type": "string"},
      "size": {"enum": ["small", "large"]}
    }
  }}}
}`

// inline is a task of this request: a text, and a JSON Schema or "" for free text.
func inline(user, schema string) *pb.Task {
	task := &pb.InlineTask{User: user}
	if schema != "" {
		task.Grammar = &pb.Grammar{Kind: &pb.Grammar_JsonSchema{JsonSchema: schema}}
	}
	return &pb.Task{Source: &pb.Task_Inline{Inline: task}}
}

func run(ctx context.Context, vision pb.VisionServiceClient, image []byte) error {
	images := []*pb.Image{{Source: &pb.Image_Data{Data: image}}}

	analysed, err := vision.AnalyzeImage(ctx, &pb.AnalyzeImageRequest{Images: images})
	if err != nil {
		return err
	}
	fmt.Println("Analysis:", analysed.GetAnalysis().GetDescription())

	list := inline("List every object with its position, shape, color and size.", schema)
	answer, err := vision.RunTask(ctx, &pb.RunTaskRequest{Task: list, Images: images})
	if err != nil {
		return err
	}
	fmt.Println("Objects:", answer.GetResult().GetJson()) // valid against the schema

	fmt.Print("Place: ")
	place := inline("Where is this? Answer with one word.", "")
	stream, err := vision.StreamTask(ctx, &pb.StreamTaskRequest{Task: place, Images: images})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		fmt.Print(event.GetDelta()) // provisional until the result
	}
	fmt.Println()

	tooHot := 3.0
	_, err = vision.RunTask(ctx, &pb.RunTaskRequest{
		Task: list, Images: images, Sampling: &pb.SamplingOptions{Temperature: &tooHot},
	})
	fmt.Println("An error:", explain(err))
	return nil
}

// explain gives the status, the reason and the fields that are wrong.
func explain(err error) string {
	failed := status.Convert(err)
	text := fmt.Sprintf("%s: %s", failed.Code(), failed.Message())
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			text += fmt.Sprintf("\n  reason %s, request id %s", detail.Reason, detail.Metadata["request_id"])
		case *errdetails.BadRequest:
			for _, one := range detail.FieldViolations {
				text += fmt.Sprintf("\n  %s %s", one.Field, one.Description)
			}
		}
	}
	return text
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "client IMAGE [HOST:PORT]")
		os.Exit(2)
	}
	address := "localhost:50051"
	if len(os.Args) > 2 {
		address = os.Args[2]
	}
	image, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = call(image, address)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, explain(err))
		os.Exit(1)
	}
}

func call(image []byte, address string) error {
	security := grpc.WithInsecure() // from grpc 1.34 on: WithTransportCredentials(insecure.NewCredentials())
	if ca := os.Getenv("QWEN3VL_CA"); ca != "" {
		tls, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return err
		}
		security = grpc.WithTransportCredentials(tls)
	}
	channel, err := grpc.Dial(address, security)
	if err != nil {
		return err
	}
	defer channel.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the server stops when it is over
	defer cancel()
	if key := os.Getenv("QWEN3VL_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	return run(ctx, pb.NewVisionServiceClient(channel), image)
}
