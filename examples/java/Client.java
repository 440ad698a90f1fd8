// An image becomes a typed answer, from Java: three calls, and an error that can be read.
//
//   build/client IMAGE [HOST:PORT]
//
// QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key.
import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import google.rpc.Errors.BadRequest;
import google.rpc.Errors.ErrorInfo;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.TimeUnit;
import qwen3vl.v1.AnalyzeImageRequest;
import qwen3vl.v1.Grammar;
import qwen3vl.v1.Image;
import qwen3vl.v1.InlineTask;
import qwen3vl.v1.RunTaskRequest;
import qwen3vl.v1.SamplingOptions;
import qwen3vl.v1.StreamTaskRequest;
import qwen3vl.v1.Task;
import qwen3vl.v1.VisionServiceGrpc;
import qwen3vl.v1.VisionServiceGrpc.VisionServiceBlockingStub;

public final class Client {
  private static final String SCHEMA =
      """
      {"type": "object", "additionalProperties": false, "required": ["objects"],
       "properties": {"objects": {"type": "array", "items": {
         "type": "object", "additionalProperties": false,
         "required": ["position", "shape", "color", "size"],
         "properties": {
           "position": {"type": "string"}, "shape": {"type": "string"}, "color": {"type": "string"},
           "size": {"enum": ["small", "large"]}}}}}}
      """;

  private Client() {}

  public static void main(String[] arguments) throws IOException, InterruptedException {
    Image image =
        Image.newBuilder()
            .setData(ByteString.copyFrom(Files.readAllBytes(Path.of(arguments[0]))))
            .build();
    String address = arguments.length > 1 ? arguments[1] : "localhost:50051";
    String ca = System.getenv("QWEN3VL_CA");
    NettyChannelBuilder builder = NettyChannelBuilder.forTarget(address);
    if (ca == null) {
      builder.usePlaintext();
    } else {
      builder.sslContext(GrpcSslContexts.forClient().trustManager(new File(ca)).build());
    }
    ManagedChannel channel = builder.build();
    try {
      run(stub(channel), image);
    } catch (StatusRuntimeException error) {
      System.err.println(explain(error));
      System.exit(1);
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  private static VisionServiceBlockingStub stub(ManagedChannel channel) {
    // The server stops when the deadline is over.
    VisionServiceBlockingStub stub =
        VisionServiceGrpc.newBlockingStub(channel).withDeadlineAfter(60, TimeUnit.SECONDS);
    String key = System.getenv("QWEN3VL_API_KEY");
    if (key == null) {
      return stub;
    }
    Metadata headers = new Metadata();
    headers.put(
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + key);
    return stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }

  private static void run(VisionServiceBlockingStub vision, Image image) {
    var analysed = vision.analyzeImage(AnalyzeImageRequest.newBuilder().addImages(image).build());
    System.out.println("Analysis: " + analysed.getAnalysis().getDescription());

    Task list =
        task(
            InlineTask.newBuilder()
                .setUser("List every object with its position, shape, color and size.")
                .setGrammar(Grammar.newBuilder().setJsonSchema(SCHEMA)));
    var answer = vision.runTask(RunTaskRequest.newBuilder().setTask(list).addImages(image).build());
    System.out.println("Objects: " + answer.getResult().getJson()); // valid against the schema

    Task place = task(InlineTask.newBuilder().setUser("Where is this? Answer with one word."));
    var stream =
        vision.streamTask(StreamTaskRequest.newBuilder().setTask(place).addImages(image).build());
    System.out.print("Place: ");
    while (stream.hasNext()) {
      System.out.print(stream.next().getDelta()); // provisional until the result
    }
    System.out.println();

    try {
      vision.runTask(
          RunTaskRequest.newBuilder()
              .setTask(list)
              .addImages(image)
              .setSampling(SamplingOptions.newBuilder().setTemperature(3))
              .build());
    } catch (StatusRuntimeException error) {
      System.out.println("An error: " + explain(error));
    }
  }

  private static Task task(InlineTask.Builder inline) {
    return Task.newBuilder().setInline(inline).build();
  }

  /** Status, reason and the fields that are wrong. */
  private static String explain(StatusRuntimeException error) {
    var status = error.getStatus();
    var text = new StringBuilder(status.getCode() + ": " + status.getDescription());
    var details = StatusProto.fromThrowable(error);
    if (details == null) {
      return text.toString();
    }
    try {
      for (Any detail : details.getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          text.append("\n  reason ").append(info.getReason());
          text.append(", request id ").append(info.getMetadataOrThrow("request_id"));
        } else if (detail.is(BadRequest.class)) {
          for (var one : detail.unpack(BadRequest.class).getFieldViolationsList()) {
            text.append("\n  ").append(one.getField()).append(" ").append(one.getDescription());
          }
        }
      }
    } catch (InvalidProtocolBufferException broken) {
      text.append("\n  its details cannot be read: ").append(broken.getMessage());
    }
    return text.toString();
  }
}
