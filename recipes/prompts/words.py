"""The words that captions are made of: everyday things, with no name of a person, a brand, an artist or a work."""

from __future__ import annotations

# What is shown, by kind: subjects, what they do or are like, and where they are.
PEOPLE = (
    *("an old fisherman", "a young woman with curly hair", "a baker", "a boy with a backpack", "a nurse"),
    *("a girl with freckles", "a gardener", "a street musician", "a farmer", "a couple", "two children"),
    *("a dancer", "a carpenter", "a scientist", "a firefighter", "a grandmother", "a bearded man"),
    *("a teacher", "a cyclist", "a climber", "a swimmer", "a family of four", "a group of friends"),
    *("a woman in a hijab", "a man in a wheelchair", "a potter", "a violinist", "a chess player"),
    *("a tailor", "a beekeeper", "a runner", "a fruit seller", "a mechanic", "a toddler", "an astronaut"),
    *("a knight in armour", "a shepherd", "a pilot", "a librarian", "a chef", "a photographer", "a welder"),
)
PEOPLE_DOING = (
    *("laughing", "reading a book", "drinking tea", "looking out of a window", "walking a dog"),
    *("holding an umbrella", "repairing a bicycle", "waiting for a bus", "carrying a basket of apples"),
    *("writing a letter", "playing the guitar", "watching the rain", "cooking soup", "feeding pigeons"),
    *("looking at the camera", "seen from behind", "resting on a bench", "crossing a bridge", "sleeping"),
    *("wearing a red coat", "wearing a straw hat", "with a yellow scarf", "painting a wall", "dancing"),
    *("climbing a ladder", "holding a lantern", "sitting on the floor", "sharing a meal", "planting a tree"),
)
ANIMALS = (
    *(
        "a cat",
        "a dog",
        "a red fox",
        "an owl",
        "a horse",
        "two swans",
        "a hedgehog",
        "an elephant",
        "a tiger",
    ),
    *("a penguin", "a sea turtle", "a parrot", "a rabbit", "a brown bear", "a deer", "a frog", "a goldfish"),
    *(
        "a butterfly",
        "a bee",
        "a flock of sheep",
        "a giraffe",
        "a zebra",
        "a whale",
        "an octopus",
        "a squirrel",
    ),
    *("a snail", "a crocodile", "a koala", "a panda", "a wolf", "a hummingbird", "a kitten", "a puppy"),
    *(
        "a cow",
        "a goat",
        "a rooster",
        "a duck with ducklings",
        "a lizard",
        "a jellyfish",
        "a crab",
        "a camel",
    ),
    *("a raven", "a heron", "a seal", "an otter", "a mouse", "a moth", "a peacock", "a lion", "a donkey"),
)
ANIMALS_DOING = (
    *("sleeping", "running", "drinking water", "looking up", "hiding behind leaves", "in the snow"),
    *("on a wooden fence", "jumping over a puddle", "close up", "with its young", "in tall grass"),
    *("under a full moon", "sitting on a rock", "eating", "swimming", "stretching", "on a branch"),
    *("in the fog", "seen from the side", "crossing a stream", "in a meadow", "at the edge of a forest"),
)
OBJECTS = (
    *("a glass vase", "a pocket watch", "a pair of boots", "a teapot", "an old camera", "a wooden chair"),
    *("a stack of books", "a candle", "a key", "a bicycle bell", "a copper pot", "a violin", "a globe"),
    *("a paper boat", "a ceramic bowl", "a leather suitcase", "an oil lamp", "a ball of wool", "a hammer"),
    *("a typewriter", "a compass", "a mirror", "a kite", "a pair of glasses", "a chess set", "a toy robot"),
    *(
        "a radio",
        "a wicker basket",
        "a silver spoon",
        "a snow globe",
        "a telescope",
        "an hourglass",
        "a drum",
    ),
    *(
        "a row of glass bottles",
        "a sewing machine",
        "a red umbrella",
        "a wooden toy train",
        "a feather",
        "a bell",
    ),
    *(
        "a marble statue of a hand",
        "a music box",
        "a fishing rod",
        "a stone mortar",
        "a desk fan",
        "a ladder",
    ),
)
OBJECTS_WHERE = (
    *("on a wooden table", "on a windowsill", "on a white background", "on a shelf", "on green velvet"),
    *("in an open drawer", "on a stone floor", "in someone's hands", "on a stack of papers", "in the sand"),
    *("next to a cup of coffee", "hanging on a wall", "covered in dust", "half in shadow", "on black marble"),
    *("seen from above", "among dry leaves", "on a rusty tray", "in a glass case", "floating in the air"),
)
PLACES = (
    *("a mountain lake", "a narrow street", "a lighthouse", "a pine forest", "a desert road", "a harbour"),
    *("a snow-covered village", "a rice terrace", "a waterfall", "a city skyline", "a wooden bridge"),
    *(
        "a railway station",
        "a lavender field",
        "a canyon",
        "a tropical beach",
        "a vineyard",
        "a market square",
    ),
    *("a frozen river", "a bamboo grove", "a volcano", "a fishing village", "a stone castle", "a windmill"),
    *("a greenhouse", "a swamp", "a rooftop garden", "a subway platform", "an empty theatre", "a quarry"),
    *("a cave with stalactites", "a coral reef", "a glacier", "a wheat field", "a canal with boats", "a dam"),
    *(
        "a monastery on a cliff",
        "an abandoned factory",
        "a suburb",
        "a sand dune",
        "a coastal path",
        "an oasis",
    ),
)
PLACES_WHEN = (
    *("at sunrise", "at dusk", "in the rain", "after a storm", "in autumn", "under a starry sky"),
    *("in thick fog", "in spring, with blossoming trees", "in winter", "at noon", "with a rainbow"),
    *("seen from a drone", "reflected in water", "with a lone tree", "with birds in the sky", "at night"),
    *("with snow on the ground", "with distant mountains", "with a winding path", "before a thunderstorm"),
)
ROOMS = (
    *("a cosy living room", "a small kitchen", "a library", "a workshop", "a child's bedroom", "an attic"),
    *("a bathroom with green tiles", "a hallway", "a café", "a classroom", "a hotel lobby", "a bakery"),
    *("a music studio", "a laboratory", "a hospital corridor", "a wine cellar", "a barn", "a flower shop"),
    *("a cabin on a ship", "a train compartment", "an office", "a gym", "a museum hall", "a potter's studio"),
)
ROOMS_WITH = (
    *(
        "with a fireplace",
        "with large windows",
        "with plants everywhere",
        "with wooden beams",
        "with nobody in it",
    ),
    *("with a round table", "with a patterned carpet", "with books up to the ceiling", "with one open door"),
    *("with blue walls", "with a spiral staircase", "with hanging lamps", "with a sleeping cat", "in a mess"),
    *(
        "with white furniture",
        "with an armchair",
        "with a view of the sea",
        "with a piano",
        "with brick walls",
    ),
)
FOOD = (
    *("a bowl of ramen", "a loaf of bread", "a slice of chocolate cake", "a plate of sushi", "a fruit salad"),
    *(
        "pancakes with berries",
        "a cup of coffee",
        "a pizza",
        "a grilled fish",
        "a jar of honey",
        "tomato soup",
    ),
    *("a cheese board", "an apple pie", "a stack of cookies", "a glass of lemonade", "roasted vegetables"),
    *("dumplings", "a green salad", "an ice cream cone", "a basket of mushrooms", "boiled eggs", "a curry"),
    *(
        "a pomegranate cut in half",
        "a bunch of grapes",
        "a taco",
        "a pot of stew",
        "a sandwich",
        "a croissant",
    ),
    *("a pile of oranges", "fried rice", "a birthday cake", "garlic and onions", "a watermelon", "noodles"),
)
FOOD_WHERE = (
    *("on a rustic table", "on a blue plate", "with steam rising", "on a picnic blanket", "with fresh herbs"),
    *("at a street stall", "on a slate board", "seen from above", "in a cast-iron pan", "close up"),
    *(
        "with a linen napkin",
        "on a kitchen counter",
        "next to a window",
        "in a lunch box",
        "on a banana leaf",
    ),
)
PLANTS = (
    *("a sunflower", "a cactus", "an oak tree", "a bonsai", "a rose", "a field of poppies", "ferns", "moss"),
    *("a cherry tree in blossom", "a water lily", "a pumpkin patch", "a palm tree", "tulips", "a dandelion"),
    *(
        "ivy on a wall",
        "an orchid",
        "a birch forest",
        "mushrooms on a log",
        "a bunch of wild flowers",
        "reeds",
    ),
)
PLANTS_HOW = (
    *("covered in dew", "in the wind", "in a clay pot", "close up", "with a bee on it", "against a blue sky"),
    *(
        "in the first snow",
        "in the morning light",
        "beside a stone path",
        "with falling leaves",
        "in a glass jar",
    ),
)
VEHICLES = (
    *(
        "a steam locomotive",
        "a sailing boat",
        "a red bicycle",
        "a hot air balloon",
        "a vintage car",
        "a tram",
    ),
    *(
        "a tractor",
        "a canoe",
        "a yellow bus",
        "a propeller plane",
        "a motor scooter",
        "a cargo ship",
        "a truck",
    ),
    *("a horse-drawn cart", "a submarine", "a helicopter", "a fire engine", "a caravan", "a space station"),
    *("a rowing boat", "a cable car", "a sports car", "a ferry", "a rocket on its launch pad", "a sledge"),
)
VEHICLES_WHERE = (
    *("on a country road", "in heavy rain", "at a crossing", "parked under a tree", "above the clouds"),
    *(
        "on calm water",
        "in a busy street",
        "covered in snow",
        "on a bridge",
        "at sunset",
        "in a dusty garage",
    ),
    *("turning a corner", "in a tunnel", "beside a beach", "with its lights on", "among tall buildings"),
)
BUILDINGS = (
    *("a wooden cabin", "a glass skyscraper", "a mosque with blue tiles", "a small church", "a farmhouse"),
    *("a brick warehouse", "a pagoda", "a house on stilts", "a row of colourful houses", "an old mill"),
    *("a concrete tower block", "a temple in the jungle", "a water tower", "a tree house", "a ruined castle"),
    *("a train depot", "a modern villa", "an igloo", "a clay house", "a covered market", "an observatory"),
)
FANTASY = (
    *("a dragon", "a floating island", "a robot gardener", "a city under water", "a giant mushroom house"),
    *("a ghost ship", "a fox made of fire", "a castle made of ice", "a clockwork bird", "a tiny planet"),
    *(
        "a wizard's desk",
        "a whale that swims through clouds",
        "a door in the middle of a meadow",
        "a stone giant",
    ),
    *(
        "a train that runs among stars",
        "a forest of glass trees",
        "a moon base",
        "a phoenix",
        "a sleeping golem",
    ),
    *(
        "a library inside a tree",
        "a cat in a space suit",
        "a river of light",
        "a bridge made of books",
        "a unicorn",
    ),
)
FANTASY_HOW = (
    *("at dawn", "in a thunderstorm", "with glowing eyes", "in a quiet valley", "above a sleeping town"),
    *(
        "covered in vines",
        "in an endless desert",
        "under two moons",
        "surrounded by fireflies",
        "in deep snow",
    ),
)
ABSTRACT = (
    *(
        "overlapping circles",
        "flowing ribbons of colour",
        "a grid of small squares",
        "folded paper",
        "liquid metal",
    ),
    *(
        "a mosaic of broken glass",
        "smoke",
        "a spiral of dots",
        "layers of torn paper",
        "crystals",
        "ink in water",
    ),
    *(
        "a maze of thin lines",
        "soap bubbles",
        "woven threads",
        "waves of sand",
        "cracked paint",
        "light trails",
    ),
)
ABSTRACT_HOW = (
    *("in red and black", "in pastel colours", "in blue and gold", "in black and white", "in warm tones"),
    *("in the colours of autumn", "on a dark background", "on a white background", "in green and violet"),
)

# How it is shown.
STYLES = (
    *(
        "oil painting",
        "watercolour",
        "pencil sketch",
        "woodcut",
        "charcoal drawing",
        "pixel art",
        "clay figure",
    ),
    *(
        "children's book illustration",
        "flat vector illustration",
        "low-poly render",
        "stained glass",
        "mosaic",
    ),
    *(
        "ink drawing",
        "pastel drawing",
        "paper cut-out",
        "comic panel",
        "embroidery",
        "linocut print",
        "fresco",
    ),
    *(
        "gouache painting",
        "impressionist painting",
        "cubist painting",
        "botanical illustration",
        "line drawing",
    ),
    *(
        "3D render",
        "isometric illustration",
        "poster in three colours",
        "chalk drawing on a blackboard",
        "collage",
    ),
)
PHOTOS = (
    *("photo", "close-up photo", "black and white photo", "wide-angle photo", "macro photo", "aerial photo"),
    *("grainy film photo", "photo with shallow depth of field", "long-exposure photo", "instant photo"),
    *("studio photo", "documentary photo", "telephoto shot", "photo through a wet window"),
)
LIGHTS = (
    *("soft morning light", "golden hour", "harsh midday sun", "candlelight", "neon light", "overcast light"),
    *(
        "light from the side",
        "backlight",
        "moonlight",
        "warm lamp light",
        "diffuse light",
        "dramatic shadows",
    ),
    *("light through curtains", "a single spotlight", "firelight", "cold blue light", "dappled light"),
)
VIEWS = (
    *(
        "seen from above",
        "from a low angle",
        "centred",
        "with much empty space",
        "rule of thirds",
        "symmetrical",
    ),
    *(
        "wide shot",
        "medium shot",
        "close up",
        "with a blurred background",
        "framed by a window",
        "full figure",
    ),
    *("diagonal composition", "reflected in a puddle", "silhouette", "with a strong foreground"),
)
MOODS = (
    *(
        "calm",
        "cheerful",
        "gloomy",
        "mysterious",
        "nostalgic",
        "lively",
        "lonely",
        "peaceful",
        "tense",
        "dreamy",
    ),
    *("muted colours", "bright colours", "high contrast", "earthy tones", "monochrome", "pale colours"),
)
