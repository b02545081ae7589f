"""Which icons the playground uses: the named things of scenes, and the four groups."""

from __future__ import annotations

# icon name in the collection "noto" -> the word used for it
THINGS = {
    "red-apple": "apple",
    "banana": "banana",
    "dog-face": "dog",
    "frog": "frog",
    "tropical-fish": "fish",
    "butterfly": "butterfly",
    "evergreen-tree": "tree",
    "sunflower": "flower",
    "house": "house",
    "star": "star",
    "key": "key",
    "umbrella": "umbrella",
    "balloon": "balloon",
    "rocket": "rocket",
    "automobile": "car",
    "bell": "bell",
    "crown": "crown",
    "soccer-ball": "ball",
    "hot-beverage": "cup",
    "alarm-clock": "clock",
}
SCENE_THINGS = ("apple", "dog", "fish", "tree", "house", "star", "umbrella", "rocket", "car", "ball", "cup", "crown")
ICON_OF = {word: name for name, word in THINGS.items()}

GROUPS = {
    "animal": """ant baby-chick badger bat bear beaver beetle bird bison black-cat blowfish boar bug butterfly camel
        cat cat-face chicken chipmunk cow cow-face crab cricket crocodile deer dodo dog dog-face dolphin donkey dove
        duck eagle elephant ewe fish flamingo fly fox frog giraffe goat goose gorilla hamster hedgehog hippopotamus
        honeybee horse horse-face jellyfish kangaroo koala lady-beetle leopard lion lizard llama lobster mammoth
        monkey monkey-face moose mosquito mouse mouse-face octopus orangutan otter owl ox panda parrot peacock penguin
        pig pig-face polar-bear poodle rabbit rabbit-face raccoon ram rat rhinoceros rooster scorpion seal shark
        shrimp skunk sloth snail snake spider spouting-whale squid swan tiger tiger-face tropical-fish turkey turtle
        two-hump-camel water-buffalo whale wolf worm zebra""",
    "food": """avocado bacon bagel baguette-bread banana beans bell-pepper bento-box birthday-cake blueberries bread
        broccoli burrito butter candy carrot cheese-wedge cherries chestnut chocolate-bar coconut cooked-rice cookie
        croissant cucumber cupcake curry-rice custard cut-of-meat dango doughnut dumpling ear-of-corn egg eggplant
        falafel fish-cake-with-swirl flatbread fortune-cookie french-fries fried-shrimp garlic grapes green-apple
        green-salad hamburger hot-dog hot-pepper ice-cream kiwi-fruit leafy-green lemon lollipop mango meat-on-bone
        melon moon-cake oden olive onion pancakes peach peanuts pear pie pineapple pizza popcorn pot-of-food potato
        poultry-leg pretzel red-apple rice-ball rice-cracker roasted-sweet-potato sandwich shaved-ice shortcake
        soft-ice-cream spaghetti steaming-bowl strawberry stuffed-flatbread sushi taco tamale tangerine tomato waffle
        watermelon""",
    "vehicle": """aerial-tramway airplane airplane-arrival airplane-departure ambulance articulated-lorry auto-rickshaw
        automobile bicycle bullet-train bus canoe delivery-truck ferry fire-engine flying-saucer helicopter
        high-speed-train kick-scooter light-rail locomotive metro minibus monorail motor-boat motor-scooter motorcycle
        mountain-cableway mountain-railway oncoming-automobile oncoming-bus oncoming-police-car oncoming-taxi
        passenger-ship pickup-truck police-car racing-car railway-car rocket sailboat ship small-airplane speedboat
        sport-utility-vehicle suspension-railway taxi tractor train tram tram-car trolleybus""",
    "clothing": """backpack ballet-shoes bikini billed-cap briefcase briefs clutch-bag coat crown dress flat-shoe
        glasses gloves goggles graduation-cap handbag high-heeled-shoe hiking-boot jeans kimono lab-coat lipstick
        mans-shoe martial-arts-uniform military-helmet necktie one-piece-swimsuit purse rescue-workers-helmet
        running-shirt running-shoe safety-vest sari scarf shorts socks sunglasses t-shirt thong-sandal top-hat
        womans-boot womans-clothes womans-hat womans-sandal""",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
