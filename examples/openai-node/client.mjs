// OpenAI's Node SDK on this server: an answer under a schema, a stream, a task, an error.
//
//   node client.mjs IMAGE [BASE_URL]
//
// OPENAI_API_KEY=KEY sends a key.
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [image, baseURL = "http://localhost:8000/v1"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: process.env.OPENAI_API_KEY ?? "-" });

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

const url = `data:image/png;base64,${readFileSync(image).toString("base64")}`;
const part = { type: "image_url", image_url: { url } };
/** The image first: the bundled model was trained so. */
const ask = (text) => [{ role: "user", content: [part, { type: "text", text }] }];

try {
  const model = (await client.models.list()).data[0].id;

  const drawing = await client.chat.completions.parse({
    model,
    messages: ask("List every object with its position, shape, color and size."),
    response_format: zodResponseFormat(Drawing, "drawing"), // the answer fits it, or the call throws
  });
  console.log("Objects:", JSON.stringify(drawing.choices[0].message.parsed));

  process.stdout.write("Place: ");
  const stream = await client.chat.completions.create({
    model,
    messages: ask("Where is this? Answer with one word."),
    stream: true,
  });
  for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  console.log();

  const analysis = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: [part] }],
    task: "image-analysis", // a task that the server knows by its name
  });
  console.log("Analysis:", analysis.choices[0].message.content);

  await client.chat.completions.create({ model, messages: ask("Describe it."), n: 2 }).catch((error) => {
    if (!(error instanceof OpenAI.BadRequestError)) throw error;
    console.log(`An error: ${error.status} ${error.code} in ${error.param}`);
  });
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(`${error.constructor.name}: ${error.message}`);
  process.exitCode = 1;
}
