"""Floor 5: an HTTP server that speaks OpenAI's chat protocol. Needs `pip install 'opsin[serve]'`.

    request --guard, request--> Conversation, Sampling --Encoder--> Encoded --worker--> tokens --answer--> JSON, events

Names are in their modules: `app.make_app`, `settings.Settings`, `run.serve`.
"""
