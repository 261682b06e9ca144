"""The words that the general bank is made of, by what goes with what.

Things that can be counted stand in the singular, without an article.
"""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


# --- living things ------------------------------------------------------------------------------------------------

PETS = _listed("cat, kitten, dog, puppy, hamster, guinea pig, rabbit")
BREEDS = _listed(
    """poodle, beagle, dachshund, bulldog, greyhound, husky, labrador, German shepherd, corgi, terrier, dalmatian,
    Siamese cat, Persian cat"""
)
GRAZERS = _listed(
    """horse, pony, donkey, cow, bull, goat, sheep, lamb, zebra, giraffe, elephant, deer, antelope, bison, buffalo,
    camel, llama, rhinoceros, moose"""
)
HUNTERS = _listed("lion, tiger, leopard, cheetah, jaguar, wolf, fox, bear, polar bear, hyena, coyote, lynx")
MAMMALS = _listed(
    """pig, piglet, squirrel, chipmunk, mouse, rat, hedgehog, porcupine, raccoon, skunk, badger, otter, beaver, weasel,
    mole, bat, monkey, gorilla, chimpanzee, orangutan, baboon, lemur, kangaroo, koala, panda, sloth, hippopotamus,
    armadillo, anteater, meerkat, warthog"""
)
BIRDS = _listed(
    """sparrow, robin, finch, hummingbird, crow, raven, magpie, pigeon, dove, gull, pelican, albatross, eagle, hawk,
    falcon, owl, vulture, parrot, woodpecker, kingfisher, swallow, stork, heron, crane, toucan, blue jay"""
)
FOWL = _listed("rooster, hen, chick, turkey, peacock, ostrich, penguin, flamingo")
WATERFOWL = _listed("duck, duckling, swan, goose")
SEA_ANIMALS = _listed(
    """fish, goldfish, shark, whale, dolphin, seal, walrus, octopus, squid, jellyfish, stingray, clownfish, seahorse,
    sea turtle, eel"""
)
SHELLFISH = _listed("crab, lobster, shrimp, starfish, sea urchin, clam, oyster")
REPTILES = _listed(
    """snake, lizard, gecko, iguana, chameleon, crocodile, alligator, tortoise, frog, toad, salamander, dinosaur"""
)
INSECTS = _listed(
    """butterfly, moth, bee, bumblebee, wasp, fly, mosquito, dragonfly, beetle, ladybug, grasshopper, cricket, ant,
    praying mantis, caterpillar, spider, snail, slug"""
)
OTHER_ANIMALS = _listed("scorpion, centipede, earthworm, horseshoe crab, crayfish, unicorn, dragon, mermaid")
FLOWERS = _listed(
    """rose, tulip, daisy, sunflower, lily, orchid, dandelion, poppy, daffodil, carnation, lotus, iris, hibiscus,
    chrysanthemum, water lily, peony"""
)
TREES = _listed("oak tree, pine tree, palm tree, maple tree, willow tree, birch tree, cherry tree, apple tree, bonsai")
OTHER_PLANTS = _listed(
    """cactus, fern, mushroom, bush, hedge, vine, potted plant, seedling, leaf, twig, tree stump, tree trunk, pine
    cone, acorn, seed, four-leaf clover, bamboo stalk, wreath, bouquet of flowers, Christmas tree"""
)
GREENERY = _listed("grass, moss, ivy, lichen, algae, seaweed, bamboo, wheat, hay, reeds, lavender, tree bark, roots")

# --- food ---------------------------------------------------------------------------------------------------------

FRUIT = _listed(
    """apple, pear, orange, lemon, lime, banana, peach, plum, mango, pineapple, coconut, papaya, kiwi, fig, melon,
    watermelon, grapefruit, pomegranate, avocado"""
)
FRUIT_MANY = _listed(
    """apples, oranges, lemons, grapes, cherries, strawberries, blueberries, raspberries, peaches, pears"""
)
VEGETABLES = _listed(
    """tomato, potato, onion, carrot, cucumber, zucchini, eggplant, bell pepper, chili pepper, pumpkin, cabbage,
    cauliflower, radish, beet, turnip, artichoke, leek"""
)
VEGETABLES_MANY = _listed("tomatoes, potatoes, onions, carrots, beans, peas, mushrooms, peppers")
GREENS = _listed("lettuce, spinach, broccoli, celery, asparagus, garlic, corn on the cob, parsley, basil, ginger")
BAKED = _listed("bread, cake, pizza, pie, toast, cheesecake, birthday cake")
BAKED_SINGLE = _listed(
    """bagel, croissant, muffin, cupcake, doughnut, cookie, pretzel, waffle, pancake, sandwich, loaf of bread"""
)
DISHES = _listed("soup, rice, noodles, salad, cereal, popcorn, ice cream, stew, porridge, yogurt, curry, chili")
PLATED = _listed(
    """spaghetti, sushi, steak, fried chicken, dumplings, grilled fish, french fries, pancakes, tacos, bacon and eggs"""
)
HANDHELD = _listed(
    """hamburger, hot dog, burrito, taco, ice cream cone, lollipop, candy bar, popsicle, boiled egg, fried egg"""
)
STAPLES = _listed(
    """cheese, butter, honey, chocolate, candy, meat, ham, sausage, tofu, nuts, sugar, salt, flour, eggs, caviar"""
)
DRINKS = _listed("water, milk, orange juice, lemonade, iced tea, red wine, white wine, beer")
HOT_DRINKS = _listed("coffee, tea, hot chocolate, espresso")

# --- made things --------------------------------------------------------------------------------------------------

ROAD_VEHICLES = _listed(
    """car, sports car, vintage car, police car, race car, taxi, van, bus, school bus, double-decker bus, truck, pickup
    truck, fire engine, ambulance, tow truck, garbage truck, motorcycle, scooter, bicycle, tricycle, tractor,
    bulldozer, excavator, forklift, golf cart, limousine, camper van"""
)
RAIL_VEHICLES = _listed("train, steam locomotive, subway train, freight train, tram, cable car")
BOATS = _listed(
    """boat, sailboat, canoe, kayak, rowing boat, yacht, ship, cruise ship, ferry, raft, gondola, fishing boat"""
)
AIRCRAFT = _listed("airplane, jet, helicopter, hot air balloon, glider, drone, fighter jet, biplane, airship")
OTHER_VEHICLES = _listed(
    """rocket, submarine, aircraft carrier, container ship, warship, horse-drawn carriage, wheelchair, stroller,
    shopping cart, wheelbarrow, sled, tank, hovercraft, space shuttle, rickshaw, trailer"""
)
TOOLS = _listed(
    """hammer, screwdriver, wrench, saw, drill, axe, chisel, tape measure, ladder, shovel, rake, pitchfork, hoe, lawn
    mower, chainsaw, paintbrush, paint roller, bucket, toolbox, nail, screw, bolt, nut and bolt, crowbar, vise,
    anvil, hose, watering can, broom, mop, dustpan, sponge, vacuum cleaner, sewing machine, needle and thread,
    pocket knife, flashlight, lantern, torch, rope, chain, hook, pulley, padlock, key, magnet, compass, magnifying
    glass, microscope, telescope, thermometer, syringe, stethoscope, scale, hourglass, battery, light bulb, plug,
    fire extinguisher, fishing rod, crutch"""
)
TOOLS_PAIRED = _listed("scissors, pliers, tweezers, binoculars, tongs, shears, handcuffs")
WEAPONS = _listed("sword, dagger, spear, shield, bow and arrow, rifle, pistol, cannon, helmet, suit of armor")
FURNITURE = _listed(
    """chair, armchair, rocking chair, stool, bench, sofa, table, coffee table, dining table, desk, bed, bunk bed,
    crib, wardrobe, dresser, cabinet, bookshelf, drawer, shelf, mirror, lamp, chandelier, rug, curtain, pillow,
    mattress, blanket, cushion, picture frame, clock, wall clock, alarm clock, fireplace, radiator, ceiling fan,
    coat rack"""
)
KITCHENWARE = _listed(
    """cup, mug, plate, bowl, glass, wine glass, bottle, jar, jug, teapot, kettle, coffee maker, frying pan, pot, wok,
    ladle, spatula, whisk, rolling pin, cutting board, knife, fork, spoon, corkscrew, can opener, grater, colander,
    toaster, blender, oven, stove, microwave oven, refrigerator, dishwasher, sink, faucet, tray, basket, lunch box,
    thermos, tin can, egg carton, napkin, salt shaker"""
)
HOUSEHOLD = _listed(
    """bathtub, shower, toilet, toothbrush, comb, hairbrush, razor, hair dryer, towel, bar of soap, bottle of perfume,
    lipstick, candle, candlestick, vase, flower pot, trash can, laundry basket, washing machine, ironing board,
    hanger, doormat, door, doorknob, window, staircase, suitcase, cardboard box, wooden crate, barrel, birdcage,
    aquarium, mailbox, umbrella, lighter, ashtray, piggy bank, tissue box, sleeping bag, tent, hammock, bandage,
    pill bottle"""
)
ELECTRONICS = _listed(
    """computer, laptop, computer keyboard, computer mouse, monitor, printer, tablet, smartphone, telephone, rotary
    telephone, television, remote control, radio, loudspeaker, microphone, headset, camera, video camera, tripod,
    projector, calculator, game controller, circuit board, hard drive, cable, power outlet, light switch, robot,
    satellite dish, antenna, wristwatch, vinyl record, record player, cassette tape, solar panel, joystick,
    typewriter"""
)
STATIONERY = _listed(
    """book, notebook, newspaper, magazine, envelope, postage stamp, postcard, pen, pencil, crayon, marker, eraser,
    ruler, stapler, paper clip, globe, map, calendar, folder, clipboard, chalkboard, whiteboard, banknote, coin,
    credit card, passport, ticket, business card, comic book, dictionary, abacus, quill, inkwell, rubber stamp"""
)
CLOTHES = _listed(
    """shirt, T-shirt, blouse, sweater, hoodie, jacket, leather jacket, coat, raincoat, vest, suit, dress, wedding
    dress, skirt, swimsuit, bikini, bathrobe, kimono, uniform, apron, scarf, tie, bow tie, belt, glove, mitten,
    sock, shoe, boot, sneaker, sandal, slipper, high-heeled shoe, hat, cap, beanie, cowboy hat, straw hat, top hat,
    crown, turban, veil, headband, ribbon, handbag, backpack, wallet, purse, necklace, bracelet, ring, earring,
    brooch, button, zipper, mask, wig, poncho, cloak, tutu"""
)
CLOTHES_PAIRED = _listed(
    """jeans, trousers, shorts, pajamas, sunglasses, eyeglasses, goggles, overalls, stockings, headphones"""
)
INSTRUMENTS = _listed(
    """guitar, electric guitar, bass guitar, banjo, ukulele, mandolin, violin, cello, double bass, harp, piano, grand
    piano, organ, accordion, harmonica, flute, clarinet, oboe, saxophone, trumpet, trombone, French horn, tuba,
    drum, drum kit, cymbal, tambourine, xylophone, bell, gong, bagpipe, recorder, music stand"""
)
SPORTS = _listed(
    """soccer ball, football, basketball, baseball, tennis ball, golf ball, volleyball, bowling ball, beach ball,
    baseball bat, baseball glove, tennis racket, golf club, hockey stick, ice skate, roller skate, skateboard,
    surfboard, snowboard, ski, dumbbell, barbell, boxing glove, punching bag, treadmill, trampoline, diving board,
    basketball hoop, goal post, trophy, medal, whistle, frisbee, dart board, jump rope, yoga mat, parachute, life
    jacket, kite"""
)
TOYS = _listed(
    """doll, teddy bear, toy car, toy train, toy block, puzzle, jigsaw piece, yo-yo, spinning top, rubber duck,
    balloon, rocking horse, dollhouse, chess board, chess piece, playing card, die, domino, marble, puppet, swing,
    slide, seesaw, sandbox, carousel, Ferris wheel, roller coaster, snow globe, pinwheel, toy soldier, action figure"""
)
OTHER_THINGS = _listed(
    """flag, banner, poster, billboard, sign, road sign, stop sign, traffic light, street lamp, fire hydrant, parking
    meter, traffic cone, fence, gate, brick, stone, pebble, seashell, feather, bone, skull, skeleton, nest, egg,
    cobweb, beehive, gift box, party hat, fan, scarecrow, snowman, sandcastle, jack-o'-lantern, campfire, firework,
    bullet, gear, spring, wheel, tire, engine, propeller, anchor, pipe, valve, fuel pump, sundial, crystal, diamond,
    gold bar, treasure chest, scroll, statue, fossil, meteorite, sculpture, painting, photograph, cross, menorah,
    Buddha statue, totem pole"""
)
BUILDINGS = _listed(
    """house, cottage, cabin, hut, igloo, mansion, palace, castle, tower, skyscraper, apartment building, office
    building, church, cathedral, mosque, temple, pagoda, synagogue, monastery, school, university, library,
    hospital, museum, theater, stadium, factory, warehouse, barn, farmhouse, greenhouse, silo, windmill, lighthouse,
    water tower, bridge, suspension bridge, dam, pyramid, monument, fountain, arch, dome, ruin, gas station, train
    station, airport terminal, power plant, wind turbine, garage, shed, gazebo, bus stop, telephone booth, tunnel,
    pier, well, wall, balcony, chimney, steeple, column, courtyard, parking garage, treehouse, oil rig, construction
    crane, cemetery gate"""
)
BODY_PARTS = _listed(
    """face, head, eye, nose, mouth, ear, hand, finger, thumb, foot, toe, arm, elbow, shoulder, leg, knee, neck, chin,
    forehead, fist, palm, fingernail, tongue, tooth, beard, mustache, ponytail, braid, eyebrow, tattoo, wrist, ankle"""
)
BODY_MANY = _listed("hair, skin, lips, teeth, eyelashes, freckles, wrinkles, muscles, hands, feet, arms, legs, eyes")

# --- what things are made of, and look like -----------------------------------------------------------------------

METALS = _listed("metal, iron, steel, copper, brass, bronze, aluminum")
METAL_LOOKS = _listed("shiny, scratched, polished, brushed, dented, tarnished")
WOOD_LOOKS = _listed("polished, weathered, carved, painted, rotting, burnt, dark, light, rough, stacked")
STONES = _listed("stone, marble, granite, slate, sandstone, limestone")
STONE_LOOKS = _listed("polished, rough, cracked, carved, mossy, wet")
FABRICS = _listed("linen, velvet, cotton, silk, chiffon, wool, denim, satin, lace, felt, tweed, canvas")
FABRIC_LOOKS = _listed("folded, wrinkled, torn, stained, embroidered")
LEATHER_LOOKS = _listed("worn, smooth, cracked, brown, stitched")
GLASS_LOOKS = _listed("clear, frosted, broken, stained, cracked, colored, foggy")
PAPER_LOOKS = _listed("crumpled, folded, torn, lined, blank, old, burnt")
PLASTIC_LOOKS = _listed("transparent, colorful, melted, crumpled, glossy")
CONCRETE_LOOKS = _listed("cracked, smooth, stained, wet, painted")
SUBSTANCES = _listed(
    """rusty metal, corrugated iron, gold, silver, clay, mud, sand, gravel, soil, ash, dust, smoke, steam, foam,
    bubbles, slime, oil, wax, rubber, fur, feathers, scales, ice, snow, fire, lava, water, cracked earth, coal,
    ivory, bamboo, cork, straw, wool yarn, chain mail, wire mesh, barbed wire, cardboard, bricks, tiles,
    cobblestones, asphalt, plaster, peeling paint, wallpaper, carpet, porcelain, pearls, sequins, glitter, bubble
    wrap, tin foil"""
)
TEXTURES = _listed(
    """rough, smooth, furry, sleek, slimy, spiky, glossy, matte, fluffy, bumpy, grainy, fuzzy, wrinkled, cracked,
    scaly, woven, knitted, porous, fibrous, sandy, wet, dusty, sticky, hairy, feathery, velvety, crystalline,
    jagged, ribbed, perforated, braided, quilted, pleated, crumpled"""
)
THINGS_OF = {
    "wooden": """table, chair, spoon, box, door, fence, bridge, floor, bowl, bench, ladder, barrel, cabin, crate, toy,
    statue, boat, mask, staircase""",
    "metal": "gate, bucket, pipe, chair, fence, bridge, spoon, chain, door, roof, can, key, sculpture",
    "glass": "bottle, vase, window, door, jar, bowl, marble, table, roof, ball",
    "stone": "wall, bridge, statue, tower, house, arch, path, floor, fountain, staircase",
    "brick": "wall, house, chimney, path, building, oven, arch",
    "leather": "jacket, shoe, bag, sofa, belt, wallet, glove, boot, book cover, chair",
    "plastic": "bottle, chair, bag, cup, toy, bucket, fork, box, flower",
    "paper": "bag, cup, airplane, boat, lantern, plate, flower, fan",
    "concrete": "wall, floor, bridge, staircase, building, pillar",
    "ceramic": "mug, plate, vase, tile, bowl, teapot, figurine",
    "golden": "ring, crown, statue, coin, necklace, watch, cup",
    "woolen": "sweater, hat, scarf, blanket, sock, glove",
    "straw": "hat, basket, roof, mat",
    "marble": "statue, floor, column, staircase, fountain",
    "rubber": "boot, duck, tire, ball, glove",
}
COLOURS = _listed("red, orange, yellow, green, blue, purple, pink, brown, black, white, gray")
MORE_COLOURS = _listed(
    """turquoise, teal, navy blue, light blue, dark green, olive green, lime green, maroon, crimson, magenta, violet,
    lavender, beige, cream, tan, golden, silver, bronze, peach, coral, indigo, cyan, dark red, light pink, mustard
    yellow"""
)
COLOURED = _listed(
    """car, shirt, dress, wall, door, flower, umbrella, balloon, bag, hat, chair, bicycle, cup, book, curtain, scarf,
    shoe, boat, ball, house, sofa, candle"""
)
COLOURED_BY_NATURE = _listed(
    """green apple, red apple, yellow banana, red rose, white rose, pink rose, yellow tulip, blue sky, orange sky, pink
    sky, gray sky, green grass, brown grass, white cloud, dark cloud, white snow, blue ocean, turquoise water, brown
    dog, black dog, white dog, black cat, white cat, orange cat, gray cat, white horse, brown horse, black horse,
    red fox, gray wolf, brown bear, red leaf, yellow leaf, green leaf, blue bird, red bird, yellow bird, black bird,
    white bird, green frog, pink flamingo, green parrot, blonde hair, red hair, black hair, gray hair, brown hair,
    blue eyes, green eyes, brown eyes"""
)
PATTERNS = _listed(
    """striped, checkered, polka dot, floral, plaid, paisley, zigzag, plain, spotted, leopard print, tie-dye,
    camouflage"""
)
PATTERNED = _listed("fabric, shirt, dress, scarf, cushion, rug, tie, blanket, curtain, wallpaper")
MORE_PATTERNS = _listed(
    """horizontal stripes, vertical stripes, diagonal stripes, wavy lines, parallel lines, crossed lines, dots,
    circles, concentric circles, squares, triangles, hexagons, diamonds, stars, hearts, spirals, swirls, a grid, a
    honeycomb pattern, a herringbone pattern, a chevron pattern, a mosaic pattern, a fractal pattern, a geometric
    pattern, a repeating pattern, a random pattern, a symmetrical pattern, a brick pattern, a lattice, a spider web
    pattern, scales, zebra stripes, tiger stripes, giraffe spots, leopard spots, a maze, a gradient, splashes of
    paint, scribbles, static noise"""
)
SHAPES = _listed(
    """round, square, rectangular, triangular, oval, hexagonal, cylindrical, spherical, conical, star-shaped,
    heart-shaped, crescent-shaped, ring-shaped, flat, long and thin, curved, pointed, spiral, twisted, hollow,
    branching, symmetrical, irregular, tall, wide"""
)
SHAPE_NAMES = _listed(
    """circle, square, rectangle, triangle, pentagon, hexagon, octagon, oval, diamond shape, star shape, heart shape,
    cross, arrow, crescent, sphere, cube, cone, cylinder, pyramid shape, ring shape, straight line, curved line,
    sharp corner, wave, knot, loop"""
)

# --- places, weather, times ---------------------------------------------------------------------------------------

INDOORS = _listed(
    """kitchen, bedroom, living room, bathroom, dining room, attic, basement, hallway, garage, office, classroom,
    library, laboratory, hospital room, operating room, waiting room, elevator, restaurant, cafe, bar, bakery,
    supermarket, clothing store, bookstore, barber shop, gym, swimming pool, locker room, theater, cinema, concert
    hall, nightclub, museum, art gallery, church, mosque, train station, airport, subway station, bus, train, car,
    airplane cabin, cockpit, factory, warehouse, workshop, barn, stable, greenhouse, prison cell, courtroom, hotel
    lobby, casino, bowling alley, laundromat, kindergarten, pharmacy, wine cellar, cave, tunnel, tent, studio,
    closet, pantry, server room"""
)
OUTDOORS = _listed(
    """beach, forest, desert, city, mountain, lake, river, field, village, park, garden, harbor, street, highway,
    bridge, farm, vineyard, canyon, waterfall, jungle"""
)
MORE_OUTDOORS = _listed(
    """swamp, marsh, meadow, prairie, savanna, tundra, glacier, volcano, cliff, coast, island, ocean, pond, creek,
    hill, valley, sand dune, hot spring, coral reef, rainforest, bamboo forest, orchard, rice paddy, wheat field,
    cornfield, pasture, backyard, playground, parking lot, town square, alley, sidewalk, crosswalk, railroad track,
    construction site, junkyard, landfill, quarry, mine, cemetery, zoo, amusement park, golf course, tennis court,
    football field, baseball field, ski slope, skate park, race track, campsite, marina, dock, canal, market,
    shopping street, gas station, airport runway, rooftop, battlefield, slum, suburb, downtown district, skyline,
    hiking trail, dirt road"""
)
TEMPERATE = _listed(
    "forest, city, mountain, lake, river, field, village, park, garden, harbor, street, highway, bridge, farm, vineyard"
)
SEASONS = _listed("in the rain, in fog, in winter, in autumn, under snow")
TIMES = _listed("at night, at sunset, at sunrise, on a sunny day, seen from above")
WEATHER = _listed(
    """a sunny day, a cloudy day, a rainy day, a snowy day, a foggy day, a windy day, a stormy sky, a clear blue sky,
    an overcast sky, a starry sky, a red sunset, a sunrise over the sea, a rainbow, lightning, a thunderstorm, a
    tornado, a hurricane, a blizzard, hail, frost, icicles, dew on grass, raindrops on a window, a puddle, a flood,
    a drought, a sandstorm, mist over a lake, snow-covered trees, melting snow, falling snow, falling leaves, a heat
    wave, smog, a full moon, a crescent moon, an eclipse, the milky way, northern lights, a comet, a sunbeam, storm
    clouds, fluffy clouds, dark clouds, sunlight through trees, a wildfire, an earthquake, an avalanche, a volcanic
    eruption, big waves, calm water, an iceberg, dawn, dusk, noon, midnight, twilight, spring, summer, autumn,
    winter"""
)
CITIES = _listed(
    """Paris, London, New York, Tokyo, Venice, Rome, Amsterdam, San Francisco, Hong Kong, Las Vegas, Moscow, Cairo,
    Istanbul, Mumbai, Rio de Janeiro, Sydney, Berlin, Barcelona, Athens, Dubai"""
)
COUNTRIES = _listed(
    """Japan, China, India, Thailand, Vietnam, Korea, Russia, Turkey, Egypt, Morocco, Kenya, Nigeria, South Africa,
    Italy, France, Spain, Germany, Greece, Norway, Iceland, Scotland, Ireland, Canada, Mexico, Peru, Brazil,
    Argentina, Cuba, Australia, New Zealand"""
)
STYLES_OF_BUILDING = _listed(
    """Gothic, Baroque, Victorian, Roman, Greek, Chinese, Japanese, Islamic, modern, futuristic, medieval, art deco,
    brutalist, colonial"""
)

# --- people -------------------------------------------------------------------------------------------------------

ADULTS = ("man", "woman")
CHILDREN = ("boy", "girl")
PEOPLE = _listed(
    """man, woman, boy, girl, baby, toddler, teenager, old man, old woman, young man, young woman, couple, family with
    children, crowd, audience, sports team, marching band, choir, queue of people, bride and groom, pregnant woman,
    bald man, bearded man, person"""
)
ROLES = _listed(
    """firefighter, police officer, soldier, sailor, pilot, flight attendant, astronaut, doctor, nurse, surgeon,
    dentist, scientist, teacher, student, lawyer, judge, politician, priest, monk, nun, king, queen, knight, chef,
    waiter, baker, butcher, farmer, fisherman, gardener, carpenter, mechanic, electrician, plumber, construction
    worker, miner, welder, painter, sculptor, photographer, musician, singer, dancer, ballerina, actor, clown,
    magician, athlete, boxer, gymnast, cyclist, jockey, referee, cowboy, pirate, ninja, samurai, hairdresser,
    tailor, barber, cashier, beggar, tourist, hiker, diver, surfer, skier, superhero, witch, ghost"""
)
ACTIONS = _listed(
    """riding a bicycle, riding a horse, running, walking, jumping, swimming, dancing, singing, sleeping, reading a
    book, writing, drawing, painting a picture, laughing, smiling, crying, shouting, yawning, eating, drinking from
    a glass, brushing teeth, washing hands, climbing, throwing a ball, catching a ball, kicking a ball, playing the
    guitar, playing the piano, playing the violin, playing the drums, playing tennis, playing basketball, playing
    soccer, playing chess, skateboarding, surfing, skiing, ice skating, flying a kite, blowing bubbles, taking a
    picture, talking on the phone, using a laptop, watching television, waving, pointing, clapping, hugging a dog,
    petting a cat, feeding birds, holding an umbrella, holding a baby, holding flowers, sitting on a bench, lying on
    the grass, looking in a mirror, looking out of a window, wearing headphones, wearing a mask, praying"""
)
ADULT_ACTIONS = _listed(
    """driving a car, riding a motorcycle, smoking a cigarette, drinking a beer, drinking coffee, cooking, baking
    bread, chopping vegetables, washing dishes, ironing, sweeping the floor, mowing the lawn, chopping wood, digging
    a hole, planting a tree, fishing, rowing a boat, sailing, lifting weights, boxing, doing yoga, playing golf,
    shooting an arrow, giving a speech, reading a newspaper, typing on a keyboard, sewing, knitting, hammering a
    nail, repairing a car, pushing a stroller, carrying a suitcase, climbing a mountain, milking a cow, shaking
    hands, shopping for groceries"""
)
CHILD_ACTIONS = _listed(
    """playing on a swing, going down a slide, playing in the sand, building a snowman, playing with blocks, playing
    with a doll, holding a balloon, holding a teddy bear, doing homework, jumping rope, splashing in a puddle,
    eating ice cream, blowing out candles, riding a tricycle, climbing a tree"""
)
TOGETHER = _listed(
    """hugging, kissing, holding hands, dancing, fighting, arguing, talking, laughing, shaking hands, playing cards,
    eating dinner, running a race, sitting at a table, walking on the beach, posing for a photo, sitting around a
    campfire"""
)
WORN = _listed(
    """a hat, a suit, a uniform, a coat, a scarf, a helmet, glasses, sunglasses, a red shirt, a white shirt, a black
    shirt, a striped shirt, gloves, boots, a backpack, a crown, a swimsuit, a raincoat, jewelry, traditional
    clothing, a costume"""
)
FEELINGS = _listed("happy, sad, angry, surprised, scared, disgusted, tired, bored, confused, proud, worried, calm")
POSES = _listed(
    """standing, sitting, lying down, kneeling, crouching, bending over, leaning against a wall, with crossed arms,
    with raised arms, seen from behind, seen in profile, facing the camera, with closed eyes, with an open mouth,
    mid-air"""
)
EVENTS = _listed(
    """wedding, birthday party, funeral, graduation ceremony, concert, parade, protest, festival, carnival, picnic,
    barbecue, dinner party, business meeting, press conference, lecture, sports match, marathon, boxing match, car
    race, horse race, car accident, military parade, religious ceremony, fashion show, ballet performance, circus
    performance, street market, auction, election campaign, fireworks display"""
)
IDEAS = _listed(
    """loneliness, friendship, love, family life, joy, grief, fear, danger, peace, war, celebration, childhood, old
    age, wealth, poverty, work, leisure, travel, speed, stillness, order, chaos, growth, decay, freedom, teamwork,
    competition, music, science, religion, technology, nature, healthcare, education, business, history, luxury,
    mystery, elegance, simplicity"""
)

# --- how it is shown ----------------------------------------------------------------------------------------------

SHOTS = _listed(
    """a close-up photo, an extreme close-up, a macro photo, a wide-angle photo, a fisheye photo, a panoramic photo, an
    aerial photo, a satellite image, a bird's-eye view, a view from below, a side view, a front view, a rear view, a
    top-down view, a long shot, a blurry photo, a photo with motion blur, an out-of-focus photo, a sharp photo, a
    photo with a blurred background, a grainy photo, a noisy photo, a pixelated image, a low-resolution image, a
    compressed image, an overexposed photo, an underexposed photo, a dark photo, a bright photo, a high-contrast
    photo, a low-contrast photo, a black and white photo, a sepia photo, a photo with vivid colors, a photo with
    muted colors, a photo in warm tones, a photo in cool tones, a photo taken with flash, a night vision image, a
    thermal image, an infrared photo, an X-ray image, an ultrasound image, a microscope image, a long-exposure
    photo, a double exposure, a time-lapse photo, a selfie, a mirror selfie, a passport photo, a mugshot, a
    portrait, a group photo, a candid photo, a posed photo, a studio photo, a product photo on a white background, a
    stock photo, a vintage photo, a polaroid photo, a faded old photograph, a film still, a security camera image, a
    screenshot, a video game screenshot, a photo collage, a photo with a watermark, a photo with a border, a cropped
    photo, a tilted photo, an upside-down photo, a mirrored image, a reflection in water, a reflection in a window,
    a silhouette, a shadow on a wall, a photo through a window, a photo through a fence, an underwater photo, a
    photo from a moving car, a photo of a screen, a framed picture, an empty scene, a cluttered scene, a symmetrical
    composition, an object in the center, an object at the left edge, an object at the right edge, an object on a
    white background, an object on a black background, a plain gray background, a photo with a lot of empty space,
    many small objects"""
)
LIGHTS = _listed(
    """soft light, harsh sunlight, golden hour light, candlelight, moonlight, neon light, a spotlight, backlight, dim
    light, colored stage lights, a lens flare, sun rays, long shadows, city lights at night, light from a window,
    fluorescent light, firelight, Christmas lights, car headlights, a glowing object"""
)
STYLES = _listed(
    """oil painting, watercolor painting, pencil sketch, charcoal drawing, ink drawing, cartoon, comic book drawing,
    child's drawing, line drawing, mosaic, sculpture, wood carving, embroidery, stained glass window, graffiti,
    tattoo, silhouette, 3D rendering, pixel art image, icon, logo, paper cutout, woodcut print, black and white
    photo"""
)
FIGURES = _listed("statue, origami figure, plush toy, plastic toy, porcelain figurine")
SUBJECTS = _listed("cat, dog, horse, bird, flower, tree, house, woman, man, ship")
OTHER_STYLES = _listed(
    """an abstract painting, an impressionist painting, a cubist painting, a surrealist painting, a pop art print, a
    Renaissance painting, a Japanese woodblock print, a Chinese ink painting, a cave painting, a fresco, a still
    life, a landscape painting, a self-portrait, a mural, a poster, a propaganda poster, a movie poster, an album
    cover, a book cover, a magazine cover, an advertisement, a children's book illustration, an anime drawing, a
    manga page, a comic strip, a caricature, a fantasy illustration, a science fiction scene, a technical drawing, a
    blueprint, a diagram, a bar chart, a line graph, a pie chart, a scatter plot, a flow chart, a world map, a city
    map, a weather map, a floor plan, an infographic, a sheet of music, a coat of arms, a flag, a playing card, a
    postage stamp, a banknote, a collage, a tapestry, a pattern of tiles, calligraphy, an optical illusion, a meme,
    an emoji, a computer icon, a web page, a slide with bullet points, a barcode, a QR code, a crossword puzzle, a
    clay figure, an ice sculpture, a wax figure"""
)
WRITINGS = _listed(
    """handwritten text, printed text, a page of text, large bold letters, small letters, cursive handwriting, neon
    letters, text in Chinese, text in Arabic, text in Russian, text in Japanese, text in Hebrew, text in Greek, text
    in Hindi, a street sign with a name, a license plate, a price tag, a label on a bottle, a newspaper headline, a
    shop sign, subtitles, a signature, a date, a phone number, a list, a mathematical equation, computer code, a
    speech bubble, a title, a receipt, a menu, a blackboard with writing, letters carved in stone, graffiti letters,
    an engraved name, a book spine"""
)
WRITTEN = _listed(
    """stop, sale, open, closed, exit, danger, welcome, love, hello, no, yes, free, taxi, police, hotel, coffee,
    school, thank you"""
)
NUMBERS = _listed("two, three, four, five, six, many")
COUNTED = _listed(
    """dogs, cats, birds, horses, people, children, cars, boats, bicycles, trees, flowers, apples, books, bottles,
    chairs, balloons, cups, houses, cows, fish"""
)
GROUPS = _listed(
    """a flock of birds, a flock of sheep, a herd of cows, a herd of elephants, a school of fish, a pack of wolves, a
    swarm of bees, a colony of ants, a litter of puppies, a pile of books, a stack of plates, a stack of paper, a
    row of houses, a row of trees, a row of chairs, a heap of garbage, a pile of leaves, a pile of clothes, a bunch
    of keys, a bunch of grapes, a pair of shoes, a pair of birds, a set of tools, a collection of stamps, a fleet of
    ships, a line of cars, a box of chocolates, a crowd of people, a team of horses, a grove of trees, a single
    object, an empty room, an empty chair, an empty plate, an empty street"""
)
PARTS = {
    "car": "wheel, headlight, dashboard, steering wheel, license plate, engine, door, windshield, back seat",
    "bicycle": "wheel, handlebar, pedal, chain, saddle",
    "bird": "beak, wing, feathers, claws, tail",
    "dog": "paw, nose, tail, ears, eyes, fur, collar",
    "cat": "paw, whiskers, tail, ears, eyes, fur",
    "horse": "mane, hooves, head, saddle, legs",
    "elephant": "trunk, tusks, ears, skin",
    "deer": "antlers, head",
    "fish": "fin, scales, tail, gills, eye",
    "butterfly": "wing, antennae",
    "lion": "mane, teeth",
    "flower": "petals, stem, pollen",
    "tree": "trunk, branches, leaves, roots, bark",
    "house": "roof, front door, window, chimney, porch",
    "church": "steeple, altar, stained glass window, bell",
    "airplane": "wing, tail, cockpit, engine, window",
    "ship": "deck, mast, bow, anchor",
    "guitar": "strings, neck, body",
    "piano": "keys, pedals",
    "computer": "screen, keyboard, circuit board",
    "camera": "lens, buttons",
    "clock": "face, hands, gears",
    "book": "cover, spine, pages",
    "shoe": "sole, laces, heel",
    "knife": "blade, handle",
    "turtle": "shell, head",
    "spider": "legs, web",
    "snake": "head, scales",
    "train": "front, wheels, windows",
    "shirt": "collar, sleeve, buttons, pocket",
}
SMALL_ANIMALS = _listed("cat, dog, bird, rabbit")
BESIDE = _listed(
    """on a chair, under a table, on a sofa, in a box, in a basket, next to a window, behind a fence, next to a child,
    in a garden"""
)
CREATURES_DO = _listed("running, sleeping, eating, drinking water, jumping, standing in snow, looking at the camera")
GRAZERS_DO = _listed("running, eating, drinking water, standing in a field, seen from the side")
HUNTERS_DO = _listed("hunting, sleeping, running, showing its teeth, on a rock")
BIRDS_DO = _listed("in flight, on a branch, in a nest, on the ground")
SWIMMERS_DO = _listed("under water, in an aquarium")
INSECTS_DO = _listed("on a leaf, on a flower")
CLOSE = _listed(
    """an eye, a hand, a leaf, a flower, an insect, tree bark, grass, fabric, fur, feathers, hair, water drops, sand,
    stones, bricks, wood grain, rusty metal, food, a coin, text, a keyboard, a watch, a shell, fruit, bread, ice,
    bubbles, paper, a face, a wheel"""
)
