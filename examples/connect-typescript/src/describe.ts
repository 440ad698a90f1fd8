// Calls of the API, the same in a browser and in Node: three answers, and an error that can be read.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { VisionService } from "../gen/qwen3vl/v1/vision_pb";

const SCHEMA = {
  type: "object",
  additionalProperties: false,
  required: ["objects"],
  properties: {
    objects: {
      type: "array",
      items: {
        type: "object",
        additionalProperties: false,
        required: ["position", "shape", "color", "size"],
        properties: {
          position: { type: "string" },
          shape: { type: "string" },
          color: { type: "string" },
          size: { enum: ["small", "large"] },
        },
      },
    },
  },
};

/** Calls the server and gives each line of text to `print`. key: an API key, or undefined. */
export async function describe(
  image: Uint8Array,
  baseUrl: string,
  key: string | undefined,
  print: (line: string) => void,
): Promise<void> {
  const vision = createClient(VisionService, createConnectTransport({ baseUrl }));
  const options = { timeoutMs: 60_000, ...(key && { headers: { authorization: `Bearer ${key}` } }) };
  const images = [{ source: { case: "data" as const, value: image } }];
  const inline = (user: string, schema?: object) => ({
    source: {
      case: "inline" as const,
      value: {
        user,
        ...(schema && { grammar: { kind: { case: "jsonSchema" as const, value: JSON.stringify(schema) } } }),
      },
    },
  });

  const { analysis } = await vision.analyzeImage({ images }, options);
  print(`Analysis: ${analysis?.description}`);

  const list = inline("List every object with its position, shape, color and size.", SCHEMA);
  const { result } = await vision.runTask({ task: list, images }, options);
  print(`Objects: ${JSON.stringify(JSON.parse(result?.json ?? "null"))}`);

  let place = "";
  const question = inline("Where is this? Answer with one word.");
  for await (const { event } of vision.streamTask({ task: question, images }, options))
    if (event.case === "delta") place += event.value; // provisional until the result
  print(`Place: ${place}`);

  try {
    await vision.runTask({ task: list, images, sampling: { temperature: 3 } }, options);
  } catch (error) {
    print(`An error: ${explain(error)}`);
  }
}

/** Status and reason of an error of the server. */
export function explain(error: unknown): string {
  const { code, rawMessage, metadata } = ConnectError.from(error);
  return `${Code[code]} ${metadata.get("x-error-reason") ?? ""}: ${rawMessage}`;
}
