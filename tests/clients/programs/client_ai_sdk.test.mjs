// Vercel's AI SDK: generateObject, streamObject, text and tools (https://ai-sdk.dev), with its
// provider for compatible servers and with that for OpenAI, whose default is /v1/responses.

import assert from 'node:assert/strict';
import { appendFileSync } from 'node:fs';
import { test } from 'node:test';

import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import {
  APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool,
} from 'ai';
import { z } from 'zod';

const baseURL = process.env.CLIENT_BASE_URL;
const id = process.env.CLIENT_MODEL;
const compatible = createOpenAICompatible({
  name: 'pellucid', baseURL, apiKey: 'any', supportsStructuredOutputs: true, includeUsage: true,
});
const models = {
  compatible: compatible(id),
  openai: createOpenAI({ baseURL, apiKey: 'any' }).chat(id),
  responses: createOpenAI({ baseURL, apiKey: 'any' })(id), // its default
};
const settings = { temperature: 0, maxOutputTokens: 80, maxRetries: 0 };
const person = z.object({ name: z.string(), age: z.number().int() });
const people = [['Ann', 31], ['Bob', 7], ['Chloé', 54], ['Dmitri', 90], ['Eve', 18]];
const cities = ['Oslo', 'Paris', 'Lima', 'Rome', 'Cairo'];

// What the model chooses is listed, because it is no property of the server.
function judge(name, judgements) {
  const right = judgements.filter(Boolean).length;
  const line = `${right} of ${judgements.length}  ai_sdk: ${name}\n`;
  appendFileSync(process.env.CLIENT_CHOICES, line);
}

function weather(asked) {
  return tool({
    description: 'Get the current weather in a city',
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      asked.push(city);
      return { city, weather: 'sunny', celsius: 21 };
    },
  });
}

for (const [name, model] of Object.entries(models)) {
  test(`${name}: generateObject returns objects`, async () => {
    const judgements = people.map(async ([who, age]) => {
      const prompt = `${who} is ${age} years old.`;
      const { object, usage } = await generateObject({ model, schema: person, prompt, ...settings });
      assert.equal(typeof object.age, 'number');
      assert.ok(usage.outputTokens > 0);
      return object.name === who && object.age === age;
    });
    judge(`${name} generateObject`, await Promise.all(judgements));
  });

  test(`${name}: generateObject of an array, an enum and any JSON`, async () => {
    const { object: array } = await generateObject({
      model, output: 'array', schema: person, prompt: 'Ann is 31, Bob is 7.', ...settings,
    });
    assert.ok(array.every((item) => person.safeParse(item).success));
    const { object: colour } = await generateObject({
      model, output: 'enum', enum: ['red', 'green'], prompt: 'The colour of grass', ...settings,
    });
    assert.ok(['red', 'green'].includes(colour));
    const { object: any } = await generateObject({
      model, output: 'no-schema', prompt: 'Reply in JSON: Ann is 31.', ...settings,
    });
    assert.equal(typeof any, 'object');
  });

  test(`${name}: streamObject streams partial objects`, async () => {
    const { partialObjectStream, object } = streamObject({
      model, schema: person, prompt: 'Ann is 31 years old.', ...settings,
    });
    const parts = [];
    for await (const part of partialObjectStream) parts.push(part);
    assert.ok(parts.length > 1);
    assert.ok(person.safeParse(await object).success);
  });

  test(`${name}: streamText streams text and usage`, async () => {
    const result = streamText({ model, prompt: 'Say hello.', ...settings });
    let text = '';
    for await (const part of result.textStream) text += part;
    assert.ok(text.length > 0);
    assert.ok((await result.usage).outputTokens > 0);
  });

  test(`${name}: an error has its status and body`, async () => {
    const call = generateText({ model, prompt: 'hi', ...settings, temperature: 7 });
    await assert.rejects(call, (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 400);
      assert.equal(error.data.error.param, 'temperature');
      return true;
    });
  });

  test(`${name}: a required tool runs and its result is sent back`, async () => {
    const asked = [];
    const result = await generateText({
      model,
      tools: { weather: weather(asked) },
      prompt: 'What is the weather in Oslo?',
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
      stopWhen: stepCountIs(2),
      ...settings,
    });
    assert.equal(result.steps.length, 2);
    assert.equal(result.steps[0].finishReason, 'tool-calls');
    assert.equal(result.steps[0].toolCalls[0].toolName, 'weather');
    assert.ok(asked.length > 0);
    assert.ok(result.text.length > 0);
  });

  test(`${name}: a call is streamed in pieces`, async () => {
    const result = streamText({
      model,
      tools: { weather: weather([]) },
      toolChoice: { type: 'tool', toolName: 'weather' },
      prompt: 'What is the weather in Oslo?',
      ...settings,
    });
    const types = [];
    for await (const part of result.stream ?? result.fullStream) types.push(part.type);
    for (const type of ['tool-input-start', 'tool-input-delta', 'tool-input-end', 'tool-call']) {
      assert.ok(types.includes(type), types.join());
    }
    assert.equal(types.includes('error'), false);
  });

  test(`${name}: the model decides to call a tool`, async () => {
    const judgements = cities.map(async (city) => {
      const asked = [];
      await generateText({
        model,
        tools: { weather: weather(asked) },
        prompt: `What is the weather in ${city}?`,
        ...settings,
      });
      return asked.length === 1 && asked[0] === city;
    });
    judge(`${name} calls a tool`, await Promise.all(judgements));
  });
}
