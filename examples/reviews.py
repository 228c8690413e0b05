"""What the reviews are made of: for each kind of thing, the aspects that people write about and how they praise or blame them.

Hotels, restaurants and films are donors; gadgets are the target. They share the question and the form of the answer, not the
things, the aspects or the phrases. All phrases were written for this project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Aspect:
    """One aspect: names for it, and predicates that praise or blame it."""

    subjects: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """One kind of thing that is reviewed: neutral opening sentences, and its aspects by the name that the answer gives."""

    openings: tuple[str, ...]
    aspects: dict[str, Aspect]


HOTEL = Domain(
    ("We stayed two nights.", "Here for a wedding.", "A short break in May.", "Third visit.", "I came for work.", "Booked late."),
    {
        "room": Aspect(
            ("The room", "Our suite", "The bed", "The bathroom"),
            ("was spotless", "felt brand new", "was bright and comfortable", "had all the space we wanted"),
            ("smelled of smoke", "was covered in stains", "looked worn out", "was far too small"),
        ),
        "staff": Aspect(
            ("The receptionist", "The porter", "The manager", "The cleaner"),
            ("could not do enough for us", "was kind", "solved it in a minute", "greeted us with a smile"),
            ("shouted at us", "ignored us", "was rude", "lost our bags and shrugged"),
        ),
        "breakfast": Aspect(
            ("The buffet", "Breakfast", "The morning coffee", "The bread in the morning"),
            ("was fresh", "had a huge choice", "was the best I have had", "got us up early with joy"),
            ("was stale", "ran out by eight", "was cold", "tasted of cardboard"),
        ),
        "location": Aspect(
            ("The street", "The area", "The place it stands in", "The neighbourhood"),
            ("was quiet", "felt safe", "was close to everything", "had a lovely view of the sea"),
            ("was loud all night", "felt unsafe", "was miles from anything", "had no bus at all"),
        ),
    },
)

RESTAURANT = Domain(
    (
        "Dinner for two.",
        "We had lunch here.",
        "A birthday meal.",
        "We walked in by chance.",
        "My sister chose it.",
        "Sunday noon.",
    ),
    {
        "food": Aspect(
            ("The soup", "My steak", "The pasta", "The dessert"),
            ("was delicious", "was cooked to perfection", "melted in the mouth", "made us ask for more"),
            ("was burnt", "tasted of nothing", "made me ill", "was swimming in grease"),
        ),
        "service": Aspect(
            ("The waiter", "Our waitress", "The host", "The boy who served us"),
            ("was attentive", "knew every dish", "brought water before we asked", "was a delight"),
            ("forgot our order", "rolled his eyes", "took an hour to come", "spilled wine on me"),
        ),
        "price": Aspect(
            ("The bill", "What we paid", "The set menu", "The wine list"),
            ("was a bargain", "was very fair", "cost less than we feared", "gave a lot for the money"),
            ("was a rip-off", "was shockingly high", "had hidden extras", "cost twice what it should"),
        ),
        "mood": Aspect(
            ("The dining room", "The terrace", "The light", "The atmosphere"),
            ("was romantic", "made us feel at home", "was warm and lively", "was charming"),
            ("was gloomy", "felt like a canteen", "was freezing", "gave us a headache"),
        ),
    },
)

FILM = Domain(
    (
        "Saw it last night.",
        "Watched it with friends.",
        "I had read the book.",
        "On a long flight.",
        "A rainy evening.",
        "At a festival.",
    ),
    {
        "story": Aspect(
            ("The plot", "The mystery", "The script", "The love story"),
            ("gripped me", "was clever", "kept us guessing", "moved me to tears"),
            ("made no sense", "was full of holes", "dragged on", "bored us stiff"),
        ),
        "acting": Aspect(
            ("The lead", "The villain", "The young actress", "The whole cast"),
            ("was brilliant", "deserves an award", "was utterly convincing", "lit up every scene"),
            ("was wooden", "mumbled through it", "overdid everything", "looked asleep"),
        ),
        "music": Aspect(
            ("The score", "The theme song", "The soundtrack", "The piano in the background"),
            ("gave me goosebumps", "was beautiful", "fitted every moment", "stayed in my head for days"),
            ("was deafening", "drowned the voices", "was cheap and dull", "got on my nerves"),
        ),
        "ending": Aspect(
            ("The last scene", "The final twist", "The finale", "The way it closes"),
            ("was perfect", "left us speechless", "tied it all together", "was worth the wait"),
            ("fell flat", "was ridiculous", "came out of nowhere", "spoiled it all"),
        ),
    },
)

GADGET = Domain(
    (
        "Bought it in June.",
        "A gift from my son.",
        "I replaced my old one.",
        "Used daily for a month.",
        "Ordered online.",
        "My second one.",
    ),
    {
        "battery": Aspect(
            ("One charge", "The power pack", "The battery", "Its charge"),
            ("lasts for days", "outlives every rival", "is still full at night", "never lets me down"),
            ("dies by noon", "drains while idle", "swelled up", "barely holds an hour"),
        ),
        "screen": Aspect(
            ("The display", "The picture", "The glass", "The touch panel"),
            ("is razor sharp", "shows rich colours", "reacts at once", "is easy to read in the sun"),
            ("flickers", "cracked on day one", "has dead pixels", "is dim and blurry"),
        ),
        "sound": Aspect(
            ("The speaker", "The bass", "The audio", "The volume"),
            ("fills the room", "is crystal clear", "is rich and full", "beats my old stereo"),
            ("crackles", "is tinny", "buzzes at every note", "is hardly audible"),
        ),
        "delivery": Aspect(
            ("The parcel", "The shipping", "The courier", "The package"),
            ("came a day early", "arrived in perfect shape", "was at my door in hours", "was quick and careful"),
            ("came three weeks late", "went to the wrong house", "left it in the rain", "lost half the parts"),
        ),
    },
)
