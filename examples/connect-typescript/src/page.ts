// The page: choose an image, and read the answers.
import { describe, explain } from "./describe";

const found = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const output = found("output");
const print = (line: string) => {
  output.textContent += `${line}\n`; // as text: what a model writes never becomes markup
};

found<HTMLInputElement>("image").addEventListener("change", async ({ target }) => {
  const [file] = (target as HTMLInputElement).files ?? [];
  if (!file) return;
  output.textContent = "";
  const key = found<HTMLInputElement>("key").value || undefined;
  const address = found<HTMLInputElement>("address").value;
  try {
    await describe(new Uint8Array(await file.arrayBuffer()), address, key, print);
  } catch (error) {
    print(explain(error));
  }
  output.dataset.done = "yes";
});
