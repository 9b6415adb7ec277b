"""Support tickets for notebook 8: texts with labels, drawn at random from a few phrases."""

import random

PHRASES = {
    "billing": [
        "I was charged twice for my order",
        "the invoice shows a wrong amount",
        "please refund the payment of last month",
        "my credit card was declined at checkout",
        "the price on the receipt is higher than the one I paid",
    ],
    "delivery": [
        "my parcel has not arrived yet",
        "the courier left the package at a wrong address",
        "tracking has shown no progress since Monday",
        "half of the shipment is missing",
        "can I change the delivery date",
    ],
    "account": [
        "I cannot log in with my new password",
        "the reset link in the mail has expired",
        "please delete my profile and all my data",
        "someone has changed the email address of my account",
        "two factor authentication asks for a code I never get",
    ],
    "defect": [
        "the screen stays black after the update",
        "the app crashes whenever I open the camera",
        "the battery is empty after an hour",
        "a button on the remote control is broken",
        "the speaker makes a crackling noise",
    ],
}
AROUND = [
    "hello",
    "good morning",
    "thank you in advance",
    "I have been a customer for ten years",
    "please answer soon",
    "this is the second time I write",
    "I look forward to your reply",
]
DROPPED = 0.5  # of the words


def drawn(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`count` texts, and the label of each: a phrase or two, with words missing, amid pleasantries.

    The same seed gives the same texts.
    """
    chance = random.Random(seed)
    labels = [chance.choice(list(PHRASES)) for _ in range(count)]
    return [_text(label, chance) for label in labels], labels


def _text(label: str, chance: random.Random) -> str:
    parts = chance.sample(PHRASES[label], chance.choice((1, 2)))
    parts = [" ".join(w for w in part.split() if chance.random() > DROPPED) for part in parts]
    return ", ".join([chance.choice(AROUND), *parts, chance.choice(AROUND)])
