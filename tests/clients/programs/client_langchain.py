"""LangChain's standard tests for chat models, with langchain-openai.

https://reference.langchain.com/python/langchain-tests: the tests that every integration must pass.
Those for pictures, sound and PDF skip themselves, because the model takes text only.
"""

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAI(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["CLIENT_MODEL"],
            "base_url": os.environ["CLIENT_BASE_URL"],
            "api_key": "any",
            "temperature": 0,
            "stream_usage": True,
        }

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 100, "timeout": 600, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str | None:
        return "smollm2-135m-instruct"
