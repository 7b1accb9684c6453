"""Which of COCO's 80 categories a text names: plain synonyms of each, found as whole words, the longest phrase first.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) counts objects so. The list is this project's own and shorter than
theirs; it holds nouns that people use in captions. A plural counts as its singular. Phrases that contain a category's
word and mean something else ("home plate", "train track") are listed last, and name nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from microvlm.training.scoring.text_measures import words_of

_TABLE = """
person: man, woman, boy, girl, child, kid, baby, toddler, infant, lady, guy, gentleman, people, adult, teenager,
    human, player, batter, pitcher, catcher, umpire, referee, skier, snowboarder, skateboarder, surfer, rider,
    cyclist, bicyclist, biker, motorcyclist, driver, pedestrian, passenger, worker, officer, policeman, fireman,
    firefighter, soldier, chef, cook, waiter, waitress, student, teacher, athlete, crowd, bride, groom, mother,
    father, mom, dad, son, daughter, brother, sister, friend, someone, audience, spectator, golfer, swimmer, cowboy,
    farmer, jockey, male, female
bicycle: bike, tricycle, cycle
car: automobile, sedan, taxi, cab, suv, minivan, van, jeep, hatchback, convertible, limousine, police car, race car
motorcycle: motorbike, scooter, moped, dirt bike, motor bike, motor scooter, vespa
airplane: plane, aeroplane, aircraft, jet, airliner, biplane, jumbo jet
bus: minibus, schoolbus, double decker, coach bus
train: locomotive, tram, streetcar, trolley, subway train, train car, train engine, monorail
truck: lorry, pickup, tow truck, fire truck, firetruck, dump truck, pick up truck, trailer truck, semi truck
boat: ship, sailboat, canoe, kayak, ferry, yacht, gondola, rowboat, speedboat, tugboat, motorboat, barge, dinghy
traffic light: stoplight, traffic signal, stop light, street light signal, traffic lamp
fire hydrant: hydrant
stop sign: stopsign
parking meter:
bench: park bench
bird: pigeon, duck, goose, gull, seagull, parrot, owl, eagle, penguin, swan, crow, chicken, rooster, hen, hawk,
    ostrich, peacock, pelican, flamingo, heron, turkey bird, sparrow, stork, duckling, robin, hummingbird
cat: kitten, kitty, tabby, feline
dog: puppy, pup, hound, terrier, poodle, retriever, bulldog, dachshund, spaniel, collie, beagle, canine, pug, husky
horse: pony, foal, colt, mare, stallion
sheep: lamb, ewe, ram
cow: cattle, calf, bull, ox, bovine, steer, heifer
elephant:
bear: grizzly, polar bear, brown bear, black bear, panda, bear cub
zebra:
giraffe:
backpack: rucksack, knapsack, back pack
umbrella: parasol
handbag: purse, hand bag, shoulder bag, tote bag, pocketbook
tie: necktie, bow tie, neck tie, bowtie
suitcase: luggage, suit case, baggage
frisbee: flying disc, flying disk
skis: ski
snowboard: snow board
sports ball: ball, soccer ball, tennis ball, basketball, volleyball, football, baseball, beach ball
kite:
baseball bat: bat
baseball glove: mitt, catcher's mitt, baseball mitt, glove
skateboard: skate board
surfboard: surf board, boogie board, body board
tennis racket: racket, racquet, tennis racquet
bottle: wine bottle, beer bottle, water bottle
wine glass: wineglass, champagne glass
cup: mug, teacup, coffee cup, coffee mug, paper cup, tea cup
fork:
knife: butter knife, steak knife, pocket knife
spoon: teaspoon, tablespoon
bowl:
banana:
apple:
sandwich: burger, hamburger, cheeseburger, panini, club sandwich
orange: tangerine, clementine
broccoli:
carrot:
hot dog: hotdog
pizza: pizza pie
donut: doughnut
cake: cupcake, birthday cake, wedding cake, cheesecake
chair: armchair, arm chair, stool, rocking chair, lawn chair, office chair, desk chair, recliner, seat
couch: sofa, loveseat, love seat
potted plant: houseplant, house plant, pot plant, plant in a pot
bed: bunk bed, bunkbed
dining table: table, desk, kitchen table, coffee table, picnic table, tabletop
toilet: toilet bowl, toilet seat, urinal
tv: television, tv set, television set, flat screen, flatscreen
laptop: laptop computer, notebook computer
mouse: computer mouse
remote: remote control, wii remote, wiimote, game controller, tv remote
keyboard: computer keyboard
cell phone: phone, cellphone, smartphone, smart phone, mobile phone, iphone, telephone
microwave: microwave oven
oven: stove, range oven, stove top, stovetop
toaster:
sink: washbasin, wash basin
refrigerator: fridge, freezer
book: textbook, notebook, cookbook
clock: clock face, alarm clock, wall clock
vase:
scissors: scissor, pair of scissors
teddy bear: teddy, stuffed bear, teddybear
hair drier: hair dryer, blow dryer, hairdryer, blow drier
toothbrush: tooth brush
"""
_NAMING_NOTHING = """
train track, train station, train tracks, bus stop, bus station, car seat, home plate, license plate, boat dock,
boat house, dog house, bird house, birdhouse, bird cage, cat food, dog food, dog bed, cow boy, hot pot, table cloth,
table tennis, ski slope, ski lift, ski resort, ski pole, ski poles, ski boots, kite board, tennis ball court,
baseball field, baseball game, baseball player, baseball cap, baseball hat, baseball uniform, baseball diamond,
football field, football game, football player, basketball court, basketball game, basketball player, volleyball
court, volleyball game, soccer game, cake stand, pizza box, pizza oven, pizza cutter, toilet paper, toilet brush,
book shelf, book case, bed room, bath room, bed spread, apple juice, orange juice, carrot cake, banana bread, banana
split, apple pie, apple tree, orange tree, banana tree, clock tower, bottle opener, chair lift, phone booth,
computer monitor, couch cushion, truck stop, car park, car door, parking lot, bus driver, truck driver, train
conductor, person's hand, horse shoe, bear hug, sheep skin, cow hide, keyboard player, tv show, tv stand, tv remote
control stand, oven mitt, fire place
"""
_COLOUR = "orange"
_BEFORE_FRUIT = frozenset(words_of("an the one sliced peeled cut fresh half whole this that"))
_BEHIND_FRUIT = frozenset(
    words_of("in on at with is sits sitting lying next near beside of from that cut slice slices")
)
"""Words around an orange that is a fruit."""
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "policemen": "policeman",
    "firemen": "fireman",
    "gentlemen": "gentleman",
    "knives": "knife",
    "calves": "calf",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "teddies": "teddy",
    "skis": "ski",
    "busses": "bus",
    "scissors": "scissors",
}
_QUALIFIERS = frozenset(words_of("baby adult male female mother father"))
"""Nouns that do not name a person in front of what they describe: "a baby elephant"."""
_LONGEST = 4
"""Words of the longest phrase."""


def _phrases() -> dict[tuple[str, ...], str | None]:
    """Words of a phrase, each as a singular -> its category, or None for one that names nothing."""
    phrases: dict[tuple[str, ...], str | None] = {}
    for text in _NAMING_NOTHING.replace("\n", " ").split(","):
        phrases[_singular_words(text)] = None
    for line in _TABLE.strip().replace("\n    ", " ").splitlines():
        category, _, synonyms = line.partition(":")
        for text in [category, *filter(None, (part.strip() for part in synonyms.split(",")))]:
            phrases[_singular_words(text)] = category
    return phrases


def _singular(word: str) -> str:
    """A noun without the ending of its plural, as far as spelling tells."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("sses", "ches", "shes", "xes", "buses")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def _singular_words(text: str) -> tuple[str, ...]:
    return tuple(_singular(word) for word in words_of(text))


_PHRASES = _phrases()
CATEGORIES = tuple(line.partition(":")[0] for line in _TABLE.strip().replace("\n    ", " ").splitlines())
"""COCO's 80 categories, in COCO's order."""


def objects_in(text: str) -> set[str]:
    """The categories that a text names."""
    plain = words_of(text)
    words = [_singular(word) for word in plain]
    found: set[str] = set()
    at = 0
    while at < len(words):
        for length in range(min(_LONGEST, len(words) - at), 0, -1):
            phrase = tuple(words[at : at + length])
            if phrase in _PHRASES:
                category = _PHRASES[phrase]
                qualifies = (
                    phrase[0] in _QUALIFIERS and length == 1 and tuple(words[at + 1 : at + 2]) in _PHRASES
                )
                if (
                    category is not None
                    and not qualifies
                    and not (category == _COLOUR and _is_colour(plain, at))
                ):
                    found.add(category)
                at += length
                break
        else:
            at += 1
    return found


def categories_of(names: Iterable[str]) -> set[str]:
    """The categories among an annotation's names of objects; other names are of no category."""
    return {name for name in (" ".join(text.split()).casefold() for text in names) if name in CATEGORIES}


def _is_colour(words: list[str], at: int) -> bool:
    """Whether "orange" stands for the colour: alone, in the singular, and not as a noun would."""
    if words[at] != _COLOUR:
        return False
    before = words[at - 1] if at else ""
    behind = words[at + 1] if at + 1 < len(words) else ""
    return not ((before in _BEFORE_FRUIT and (not behind or behind in _BEHIND_FRUIT)) or len(words) == 1)
