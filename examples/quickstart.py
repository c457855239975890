"""Talk to a running daemon (`sessiond serve`): the second question needs what the first one said."""

from sessiond.clients import Client

with Client("localhost:7431") as client:
    session = client.create_session(system="You are terse.")
    for question in ("My cat is called Zorblax.", "What is my cat called?"):
        for event in session.generate(question, max_tokens=64):
            print(event.text, end="", flush=True)
        print()
