"""Routes of 2021 to 2023, withdrawn by OpenAI, that old clients still call."""
