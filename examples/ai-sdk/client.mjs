// The Vercel AI SDK on this server: an object of a schema, a stream, an error.
//
//   node client.mjs IMAGE [BASE_URL]
//
// OPENAI_API_KEY=KEY sends a key.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText } from "ai";
import { z } from "zod";

const [image, baseURL = "http://localhost:8000/v1"] = process.argv.slice(2);
const apiKey = process.env.OPENAI_API_KEY;
const provider = createOpenAICompatible({
  name: "qwen3vl",
  baseURL,
  apiKey,
  supportsStructuredOutputs: true, // without it the SDK sends no schema, only `json_object`
});

const Drawing = z.object({
  objects: z.array(
    z.object({
      position: z.string(),
      shape: z.string(),
      color: z.string(),
      size: z.enum(["small", "large"]),
    }),
  ),
});

const part = { type: "file", mediaType: "image/png", data: readFileSync(image) };
/** The image first: the bundled model was trained so. */
const ask = (text) => [{ role: "user", content: [part, { type: "text", text }] }];

try {
  const headers = apiKey ? { authorization: `Bearer ${apiKey}` } : {};
  const models = await (await fetch(`${baseURL}/models`, { headers })).json();
  const model = provider(models.data[0].id);

  const { output } = await generateText({
    model,
    messages: ask("List every object with its position, shape, color and size."),
    output: Output.object({ schema: Drawing }),
  });
  console.log("Objects:", JSON.stringify(output));

  process.stdout.write("Place: ");
  const { textStream } = streamText({ model, messages: ask("Where is this? Answer with one word.") });
  for await (const text of textStream) process.stdout.write(text);
  console.log();

  await generateText({ model, messages: ask("Describe it."), presencePenalty: 1 }).catch((error) => {
    if (!APICallError.isInstance(error)) throw error;
    const { code, param } = error.data.error;
    console.log(`An error: ${error.statusCode} ${code} in ${param}`);
  });
} catch (error) {
  console.error(`${error.name}: ${error.message}`);
  process.exitCode = 1;
}
