"""Routes of OpenAI's API of 2021 to 2023, which OpenAI removed and old clients still call."""
