// Uses the playground as a person would and prints what it shows. Arguments: address, image, browser.

import { chromium } from "playwright-core";

const [, , address, image, executablePath] = process.argv;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const found = { problems: [] };
const page = await browser.newPage();
page.on("pageerror", (error) => found.problems.push(error.message));
page.on("console", (message) => {
  if (message.type() === "error" && !found.expect_failures && !message.text().includes("status of 400")) found.problems.push(message.text());
});
const text = (selector) => page.textContent(selector);
const texts = (selector) => page.locator(selector).allTextContents();
const attributes = (selector, names) =>
  page.locator(selector).evaluate((one, wanted) => wanted.map((name) => one.getAttribute(name)), names);

await page.goto(`${address}/playground`);
await page.waitForFunction(() => document.querySelector("#server").textContent.includes("engine"));
found.server = await text("#server");
await page.setInputFiles("#files", image);
await page.fill("#constraint", JSON.stringify({ type: "object", properties: { objects: { type: "array", maxLenght: 3 }, s: { type: "string", maxLength: 5000 } } }));
await page.waitForSelector("#verdict.warn");
await page.locator("details summary", { hasText: "Sampling" }).click();
await page.fill("#seed", "18446744073709551615");
const sent = page.waitForRequest((request) => request.url().endsWith("/v1/chat/completions"));
found.verdict = await text("#verdict");
found.marks = await texts("#keywords .mark");
await page.keyboard.press("Control+Enter");
await page.waitForSelector("#facts:not([hidden])");
found.sent = (await sent).postData();
found.view = await text("#view");
found.numbers = await texts("#view .number");
found.answer = await text("#text");
found.cells = await texts("#view table table td");
found.box = await attributes("#boxes rect", ["x", "y", "width", "height"]);
found.point = await attributes("#boxes circle", ["cx", "cy"]);
found.labels = await texts("#boxes text");
found.facts = await text("#facts");
found.code = await text("#snippet");
found.codes = [];
for (const language of ["python", "grpc", "curl"]) {
  await page.click(`[data-code=${language}]`);
  found.codes.push(await text("#snippet"));
}
const validated = page.waitForRequest((request) =>
  request.url().endsWith("/ValidateSchema") && request.postData().includes("propertyOrder"));
await page.selectOption("#close-objects", "true");
await page.selectOption("#property-order", "any");
found.validated = (await validated).postData();
await page.selectOption("#schema-in-prompt", "false");
const wishes = page.waitForRequest((request) => request.url().endsWith("/v1/chat/completions"));
await page.click("#run");
found.wishes = (await wishes).postData();
await page.waitForSelector("#run:not([disabled])");
found.codes_of_wishes = [];
for (const language of ["python", "grpc", "curl"]) {
  await page.click(`[data-code=${language}]`);
  found.codes_of_wishes.push(await text("#snippet"));
}
await page.fill("#seed", "1e3");
await page.locator("details summary", { hasText: "Sampling" }).click();
await page.keyboard.press("Control+Enter");
found.wrong_seed = await page.locator("#seed").evaluate((one) => [one.validity.valid, one.closest("details").open]);
await page.fill("#seed", "");
await page.fill("#constraint", "{");
await page.waitForSelector("#verdict.bad");
found.wrong_schema = await text("#verdict");
await page.selectOption("#form", "text");
found.options_of_text = await page.isVisible("#schema-options");
const plain = page.waitForRequest((request) => request.url().endsWith("/v1/chat/completions"));
await page.locator("#temperature").evaluate((one) => { one.max = "9"; one.value = "9"; });
await page.keyboard.press("Control+Enter");
await page.waitForSelector("#error:not([hidden])");
found.refused = await text("#error");
found.plain = (await plain).postData();
const chooser = page.waitForEvent("filechooser");
await page.focus("#files");
await page.keyboard.press("Enter");
found.chooser = Boolean(await chooser);
await page.evaluate(() => {
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File(["GIF89a"], "pasted.gif", { type: "image/gif" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
});
await page.waitForSelector("#images li:nth-child(2)");
found.pasted = await page.locator("#images li").count();
await page.selectOption("#form", "schema");
await page.fill("#constraint", "{}");
found.while_checking = await text("#verdict");
await page.waitForSelector("#verdict.good");
await page.setViewportSize({ width: 360, height: 700 });
found.fits_a_phone = await page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth);
found.expect_failures = true;
await page.route("**/*", (route) => route.abort());
await page.click("#run");
await page.waitForSelector("#error:not([hidden])");
found.down = await text("#error");
console.log(JSON.stringify(found));
await browser.close();
