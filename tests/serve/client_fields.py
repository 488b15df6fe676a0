"""Names of request fields that clients send, by client.

They were read from the sources of the clients, and from the protocols of the servers that the
clients support. None of them may be taken for a misspelt field.
"""

FIELDS = {
    "openai-python 3.54": """
        messages model audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls
        prediction presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention
        reasoning_effort response_format safety_identifier seed service_tier stop store
        stream_options temperature tool_choice tools top_logprobs top_p user verbosity
        web_search_options stream prompt best_of echo suffix input dimensions encoding_format
        background complexity frame_count frame_duration_ms output_compression output_format
        partial_images quality size style svg image mask markup input_fidelity file
        chunking_strategy include keywords known_speaker_names known_speaker_references language
        languages timestamp_granularities training_file validation_file hyperparameters
        integrations method suffix
        """,
    "openai-python responses": """
        background context_management conversation include input instructions max_output_tokens
        max_tool_calls previous_response_id prompt reasoning text truncation
        """,
    "LangChain": """
        n_ctx stop_sequences include_response_headers disabled_params extra_body include_usage
        output_version reasoning ls_structured_output_format context_management truncation
        use_responses_api strict cache_control model_kwargs streaming tiktoken_model_name
        chunk_size request_timeout max_retries top_k repetition_penalty ttl additional_drop_params
        default_headers include_server_side_tool_invocations
        """,
    "LiteLLM": """
        api_base api_key api_version base_url caching cache custom_llm_provider deployment_id
        drop_params extra_headers fallbacks force_timeout functions headers litellm_call_id
        litellm_metadata litellm_params litellm_session_id litellm_trace_id logger_fn max_retries
        metadata mock_response mock_tool_calls mock_timeout model_info model_list no-log num_retries
        organization preset_cache_key proxy_server_request request_timeout shared_session
        ssl_verify tags thinking timeout tpm rpm verbose web_search_options guardrails
        enable_json_schema_validation use_in_pass_through allowed_openai_params top_k min_p
        input_cost_per_token output_cost_per_token hf_model_name bos_token eos_token
        final_prompt_value initial_prompt_value roles supports_system_message text_completion
        context_window_fallback_dict cooldown_time region_name user_continue_message
        """,
    "AI SDK": """
        max_completion_tokens store metadata prediction
        service_tier verbosity prompt_cache_key safety_identifier strict_json_schema include
        """,
    "pydantic-ai": """
        extra_body extra_headers parallel_tool_calls service_tier timeout thinking reasoning
        openrouter plugins models provider provider_options transforms preset usage
        """,
    "simonw/llm": "json_object stream max_tokens frequency_penalty presence_penalty image_detail",
    "instructor": "max_retries validation_context strict response_model",
    "Agents SDK": "store metadata reasoning_effort verbosity extra_query prompt_cache_key",
    "smolagents": "stop_sequences requires_grammar grammar response_format custom_role_conversions",
    "Codex": "prompt_cache_key reasoning store include instructions input parallel_tool_calls text",
    "Zed": """
        max_completion_tokens prompt_cache_key parallel_tool_calls reasoning_effort thinking intent
        """,
    "Continue and Cline": """
        thinking reasoning cache_control enable_thinking reasoning_split raw template
        keep_alive num_ctx min_p mirostat top_a repetition_penalty stream_options suffix
        """,
    "lm-evaluation-harness": """
        prompt model max_tokens temperature logprobs echo seed stop until do_sample max_gen_toks
        add_special_tokens type input prompt_logprobs
        """,
    "vLLM": """
        use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
        include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
        spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs allowed_token_ids
        bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
        chat_template chat_template_kwargs mm_processor_kwargs structured_outputs guided_json
        guided_regex guided_choice guided_grammar guided_decoding_backend
        guided_whitespace_pattern structural_tag priority request_id logits_processors
        return_tokens_as_token_ids return_token_ids return_token_strs cache_salt
        kv_transfer_params vllm_xargs include_reasoning thinking_token_budget early_stopping
        prompt_embeds media_io_kwargs logits_processors_args repetition_detection
        bad_words_token_ids normalize softmax activation use_activation embed_dtype endianness
        pooling_params task data data_1 data_2 queries items
        """,
    "llama.cpp": """
        n_predict n_keep n_discard n_indent n_probs min_keep id_slot slot_id cache_prompt
        return_tokens return_progress samplers timings_per_token post_sampling_probs
        response_fields lora typical_p repeat_last_n repeat_penalty dynatemp_range
        dynatemp_exponent xtc_probability xtc_threshold mirostat mirostat_tau mirostat_eta
        dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers
        top_n_sigma grammar json_schema image_data prompt_string multimodal_data ignore_eos
        t_max_predict_ms t_max_prompt_ms reasoning_format reasoning_in_content
        reasoning_budget_tokens thinking_forced_open parse_tool_calls input_prefix input_suffix
        input_extra tfs_z penalize_nl penalty_prompt n_cache_reuse content with_pieces
        add_special parse_special embd_normalize adaptive_target adaptive_decay
        """,
    "SGLang": """
        regex ebnf separate_reasoning stream_reasoning no_stop_trim stop_regex lora_path rid
        session_params return_hidden_states bootstrap_host bootstrap_port bootstrap_room
        custom_logit_processor custom_params data_parallel_rank min_new_tokens max_new_tokens
        """,
    "Ollama": "options keep_alive format think raw context images template system num_predict",
    "text-generation-webui and SillyTavern": """
        mode character instruction_template name1 name2 chat_template_str preset min_length typical
        tfs rep_pen rep_pen_range top_a epsilon_cutoff eta_cutoff guidance_scale negative_prompt
        penalty_alpha do_sample truncation_length custom_token_bans ban_eos_token add_bos_token
        temperature_last smoothing_factor smoothing_curve dynamic_temperature dynatemp_low
        dynatemp_high auto_max_new_tokens sampler_priority sampler_order use_default_badwordsids
        stopping_strings stop_sequence stop_sequences nsigma mirostat_mode xtc_probability
        bypass_eos include_reasoning reasoning_effort min_keep genkey typ_p skew
        encoder_repetition_penalty no_repeat_ngram_size continue_ user_bio greeting top_n
        """,
    "OpenRouter, Groq, Together, Mistral, DeepSeek": """
        models provider route transforms plugins reasoning include_reasoning usage debug session_id
        trace top_a prompt_truncate_len safety_model safe_prompt random_seed prompt_mode
        document_image_limit reasoning_format compound_custom search_settings citation_options
        exclude_domains include_domains disable_tool_validation context_length_exceeded_behavior
        negative_prompt thinking enable_thinking thinking_budget return_images search_mode
        return_related_questions search_domain_filter echo_last repetition_penalty perf_metrics
        speculation n_beams context mask_sensitive_info bot_setting reply_constraints tag web_search
        web_plugin request_id do_sample meta user_id guardrails
        """,
    "Cohere, Jina, Voyage, Text Embeddings Inference": """
        input_type embedding_types embedding_type truncate truncation output_dtype output_dimension
        task late_chunking normalized normalize inputs texts images rank_fields max_chunks_per_doc
        max_tokens_per_doc return_embeddings return_documents raw_scores top_k top_n top_p
        priority dimensions encoding_format prompt_name truncation_direction instruction prefix
        instruct return_multivector document query model_version text image
        """,
    "image programs": """
        negative_prompt steps num_inference_steps guidance guidance_scale cfg_scale seed width
        height sampler sampler_name scheduler scheduler_name image_size batch_size lora
        loras style_type aspect_ratio watermark response_extension prompt_upsampling
        safety_tolerance url prompt_rewriter image_url image_urls strength
        init_image control_image step clip_skip
        """,
    "speech programs": """
        hotwords vad_filter vad_parameters word_timestamps diarize speaker_embeddings beam_size
        best_of task output language_detection initial_prompt batch_size without_timestamps
        condition_on_previous_text temperature_inc no_context max_len offset_t offset_n duration
        audio_url diarization timestamps punctuate filter_words
        """,
}
