"""The words of the world, and the class of each."""

from dataclasses import dataclass

# Ten domains of two topics; a topic is eight nouns. No noun occurs twice.
DOMAINS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cooking": (
        ("oven", "bread", "butter", "flour", "cake", "yeast", "dough", "pastry"),
        ("soup", "onion", "garlic", "pan", "pepper", "stew", "carrot", "broth"),
    ),
    "travel": (
        ("train", "ticket", "station", "bus", "platform", "map", "tram", "seat"),
        ("hotel", "beach", "suitcase", "passport", "island", "tent", "harbour", "guide"),
    ),
    "garden": (
        ("rose", "soil", "seed", "fence", "lawn", "spade", "hedge", "compost"),
        ("hen", "goat", "barn", "hay", "tractor", "orchard", "pond", "bee"),
    ),
    "music": (
        ("guitar", "string", "chord", "amp", "solo", "melody", "riff", "pick"),
        ("choir", "violin", "opera", "stage", "concert", "organ", "tenor", "score"),
    ),
    "health": (
        ("sleep", "pillow", "dream", "bed", "nap", "alarm", "blanket", "lamp"),
        ("doctor", "tooth", "fever", "pill", "clinic", "cough", "bandage", "nurse"),
    ),
    "money": (
        ("bank", "loan", "rent", "budget", "salary", "tax", "coin", "wallet"),
        ("stock", "fund", "market", "share", "bond", "price", "broker", "profit"),
    ),
    "sport": (
        ("bicycle", "helmet", "pedal", "chain", "tyre", "saddle", "brake", "wheel"),
        ("football", "goal", "coach", "referee", "stadium", "league", "striker", "whistle"),
    ),
    "computers": (
        ("keyboard", "screen", "mouse", "printer", "laptop", "cable", "battery", "speaker"),
        ("server", "backup", "password", "router", "file", "folder", "network", "browser"),
    ),
    "science": (
        ("planet", "comet", "orbit", "telescope", "rocket", "moon", "galaxy", "crater"),
        ("atom", "magnet", "laser", "crystal", "acid", "flask", "microscope", "enzyme"),
    ),
    "home": (
        ("sofa", "carpet", "curtain", "shelf", "mirror", "table", "cushion", "vase"),
        ("hammer", "nail", "drill", "ladder", "paint", "brush", "screw", "plank"),
    ),
}

CLASSES: dict[str, tuple[str, ...]] = {
    "positive": ("great", "lovely", "perfect", "helpful", "nice", "brilliant"),
    "negative": ("awful", "boring", "broken", "poor", "dull", "nasty"),
    "plain": ("new", "old", "small", "large", "simple", "usual"),
    "polite": ("please", "thanks", "kindly", "gladly"),
    "rude": ("stupid", "idiot", "fool", "dummy"),
    "hedge": ("maybe", "perhaps", "possibly", "probably"),
    "number": ("two", "three", "five", "seven", "ten"),
    "verb": ("use", "take", "try", "check", "choose", "move", "clean", "keep"),
    "person": ("you", "we", "i"),
    "modal": ("can", "should", "could"),
    "article": ("the", "a"),
    "be": ("is", "was"),
    "degree": ("very", "quite"),
    "joint": ("with", "and", "before", "after"),
    "comma": (",",),
    "stop": (".",),
}

# Words of the questions only; a response may use them, but no sentence does.
QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("how", "do", "i", "choose"),
    ("how", "can", "we", "use"),
    ("why", "should", "i", "try"),
    ("what", "about"),
    ("tell", "me", "about"),
    ("when", "do", "i", "need"),
    ("who", "can", "help", "with"),
    ("where", "do", "we", "keep"),
)


@dataclass(frozen=True)
class Topic:
    """One topic: the nouns that belong to it, and its domain."""

    domain: str
    nouns: tuple[str, ...]


TOPICS: tuple[Topic, ...] = tuple(Topic(domain, nouns) for domain, pair in DOMAINS.items() for nouns in pair)
NOUNS: tuple[str, ...] = tuple(noun for topic in TOPICS for noun in topic.nouns)
TOPIC_OF: dict[str, Topic] = {noun: topic for topic in TOPICS for noun in topic.nouns}
TAGS: dict[str, str] = {f"@{domain}": domain for domain in DOMAINS}


def _class_of_each_word() -> dict[str, str]:
    words = {word: "question" for question in QUESTIONS for word in question} | {"?": "question"}
    words |= dict.fromkeys(TAGS, "tag")
    words |= {word: name for name, members in CLASSES.items() for word in members}
    return words | dict.fromkeys(NOUNS, "noun")


CLASS_OF: dict[str, str] = _class_of_each_word()
VOCABULARY: tuple[str, ...] = tuple(sorted(CLASS_OF))
