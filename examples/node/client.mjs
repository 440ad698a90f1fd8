// An image becomes a typed answer, from Node: three calls, and an error that can be read.
//
//   node client.mjs PICTURE [HOST:PORT]
//
// QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const loaded = protoLoader.loadSync("qwen3vl/v1/vision.proto", {
  includeDirs: [here("../../protos")],
  enums: String,
  longs: String,
  defaults: true,
  oneofs: true,
});
const { VisionService } = grpc.loadPackageDefinition(loaded).qwen3vl.v1;
const rpc = protobuf.loadSync(here("./errors.proto")); // google.rpc, as far as it is used here

const [image, address = "localhost:50051"] = process.argv.slice(2);
const { QWEN3VL_CA: ca, QWEN3VL_API_KEY: key } = process.env;
const credentials = ca
  ? grpc.credentials.createSsl(readFileSync(ca))
  : grpc.credentials.createInsecure();
const vision = new VisionService(address, credentials);

const metadata = () => {
  const entries = new grpc.Metadata();
  if (key) entries.set("authorization", `Bearer ${key}`);
  return entries;
};
const deadline = () => ({ deadline: Date.now() + 60_000 }); // the server stops when it is over

/** A unary method as a promise. */
const call = (method, request) =>
  new Promise((resolve, reject) =>
    vision[method](request, metadata(), deadline(), (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );

/** Status, reason and the fields that are wrong. */
function explain(error) {
  if (!("details" in error)) throw error;
  const lines = [`${grpc.status[error.code]}: ${error.details}`];
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const unpack = (name, any) => rpc.lookupType(`google.rpc.${name}`).decode(any);
  for (const { typeUrl, value } of bytes ? unpack("Status", bytes).details : []) {
    if (typeUrl.endsWith("/google.rpc.ErrorInfo")) {
      const info = unpack("ErrorInfo", value);
      lines.push(`reason ${info.reason}, request id ${info.metadata.request_id}`);
    } else if (typeUrl.endsWith("/google.rpc.BadRequest")) {
      const { fieldViolations } = unpack("BadRequest", value);
      lines.push(...fieldViolations.map((one) => `${one.field} ${one.description}`));
    }
  }
  return lines.join("\n  ");
}

const images = [{ data: readFileSync(image) }];
const schema = {
  type: "object",
  additionalProperties: false,
  required: ["objects"],
  properties: { objects: { type: "array", items: { type: "string" }, maxItems: 8 } },
};
const task = {
  inline: {
    user: "List the objects in the image.",
    grammar: { jsonSchema: JSON.stringify(schema) },
  },
};

try {
  const { analysis } = await call("analyzeImage", { images });
  console.log(`AnalyzeImage: ${analysis.scene}; objects: ${JSON.stringify(analysis.objects)}`);

  const { result } = await call("runTask", { task, images });
  console.log("RunTask:", JSON.parse(result.json));
  console.log(`  ${result.usage.outputTokens} tokens from ${result.model}`);

  process.stdout.write("StreamTask: ");
  for await (const event of vision.streamTask({ task, images }, metadata(), deadline())) {
    if (event.event === "delta") process.stdout.write(event.delta); // provisional until the result
  }
  console.log();

  await call("runTask", { task, sampling: { temperature: 3 } }).catch((error) =>
    console.log(`An error: ${explain(error)}`),
  );
} catch (error) {
  console.error(explain(error));
  process.exitCode = 1;
}
vision.close();
