"""Where a message of the program leads to."""


def leads_to(title: str) -> str:
    """What the program prints behind a message that this entry of docs/trouble.md is about."""
    return f'(more: infoxlm trouble "{title.lower()}")'
