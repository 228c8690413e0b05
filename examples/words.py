"""Words that the tasks are made of, and numbers in words."""


def _words(text: str) -> list[str]:
    return text.split()


ONES = _words(
    "zero one two three four five six seven eight nine "
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
MONTHS = _words("January February March April May June July August September October November December")
PEOPLE = _words("Ana Boris Chen Dora Emil Farah Goran Hana Igor Julia Karim Lena Marco Nadia Omar Petra Rosa Samir Tilda Viktor")
CITIES = _words("Lima Oslo Cairo Hanoi Quito Dublin Nairobi Prague Lagos Osaka Tunis Porto Austin Delhi Turin Perth")
THINGS = _words("lamps chairs bikes tents mugs rugs clocks boots scarves drums kettles ladders mirrors pillows shelves stoves")
ADJECTIVES = _words("brave cold dry early flat green heavy idle jolly keen light mild narrow old pale quick round soft tall")
PLURALS = dict(
    pair.split(":")
    for pair in _words(
        "box:boxes city:cities leaf:leaves mouse:mice child:children foot:feet bus:buses knife:knives lady:ladies tooth:teeth "
        "watch:watches hero:heroes table:tables dish:dishes wolf:wolves baby:babies river:rivers goose:geese man:men "
        "story:stories key:keys glass:glasses shelf:shelves potato:potatoes"
    )
)


def in_words(number: int) -> str:
    """A number below one hundred in English words."""
    if number < len(ONES):
        return ONES[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")
