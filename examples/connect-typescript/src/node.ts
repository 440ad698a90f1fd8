//   node dist/node.mjs IMAGE [BASE_URL]
//
// QWEN3VL_API_KEY=KEY sends a key.
import { readFileSync } from "node:fs";
import { describe, explain } from "./describe";

const [image, baseUrl = "http://localhost:8000"] = process.argv.slice(2);
try {
  await describe(new Uint8Array(readFileSync(image)), baseUrl, process.env.QWEN3VL_API_KEY, console.log);
} catch (error) {
  console.error(explain(error));
  process.exitCode = 1;
}
