"""Routes of 2021 to 2023 that OpenAI has withdrawn and old clients still call."""
