"""Which icons the playground uses: the named things of scenes, the four groups, and the classes of the set Icons."""

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

# classes of the set Icons: other icons than those above
EMBLEMS = {
    "arrow": """back-arrow down-arrow down-left-arrow down-right-arrow end-arrow left-arrow left-arrow-curving-right
        left-right-arrow on-exclamation-arrow right-arrow right-arrow-curving-down right-arrow-curving-left
        right-arrow-curving-up soon-arrow top-arrow up-arrow up-down-arrow up-left-arrow up-right-arrow""",
    "book": """blue-book bookmark-tabs books closed-book green-book ledger notebook notebook-with-decorative-cover
        open-book orange-book page-facing-up page-with-curl scroll spiral-notepad""",
    "building": """bank castle church classical-building convenience-store department-store derelict-house factory
        hindu-temple hospital hotel house-with-garden hut japanese-castle japanese-post-office love-hotel mosque
        office-building post-office school shinto-shrine stadium synagogue""",
    "clock": """eight-oclock eight-thirty eleven-oclock eleven-thirty five-oclock five-thirty four-oclock four-thirty
        mantelpiece-clock nine-oclock nine-thirty one-oclock one-thirty seven-oclock seven-thirty six-oclock
        six-thirty stopwatch ten-oclock ten-thirty three-oclock three-thirty timer-clock twelve-oclock
        twelve-thirty two-oclock two-thirty watch""",
    "face": """angry-face anguished-face astonished-face beaming-face-with-smiling-eyes cold-face confounded-face
        confused-face crazy-face crying-face disappointed-face downcast-face-with-sweat drooling-face
        expressionless-face face-with-head-bandage face-with-medical-mask face-with-monocle face-with-rolling-eyes
        face-with-tears-of-joy face-with-thermometer fearful-face flushed-face frowning-face grimacing-face
        grinning-face hugging-face kissing-face lying-face money-mouth-face nauseated-face nerd-face neutral-face
        partying-face pensive-face pleading-face relieved-face shushing-face sleeping-face
        slightly-smiling-face smiling-face-with-halo smiling-face-with-heart-eyes smiling-face-with-sunglasses
        smirking-face sneezing-face thinking-face tired-face upside-down-face weary-face winking-face woozy-face
        worried-face yawning-face zipper-mouth-face""",
    "hand": """backhand-index-pointing-down backhand-index-pointing-left backhand-index-pointing-right
        backhand-index-pointing-up call-me-hand clapping-hands crossed-fingers folded-hands
        hand-with-fingers-splayed handshake index-pointing-at-the-viewer index-pointing-up left-facing-fist
        leftwards-hand love-you-gesture ok-hand oncoming-fist open-hands palm-down-hand palm-up-hand
        palms-up-together pinched-fingers pinching-hand raised-back-of-hand raised-fist raised-hand raising-hands
        right-facing-fist rightwards-hand sign-of-the-horns thumbs-down thumbs-up victory-hand vulcan-salute
        waving-hand writing-hand""",
    "heart": """beating-heart black-heart blue-heart broken-heart brown-heart green-heart grey-heart growing-heart
        heart-decoration heart-exclamation heart-on-fire heart-suit heart-with-arrow heart-with-ribbon
        light-blue-heart mending-heart orange-heart pink-heart purple-heart red-heart revolving-hearts
        sparkling-heart two-hearts white-heart yellow-heart""",
    "plant": """blossom bouquet cactus cherry-blossom fallen-leaf four-leaf-clover herb hibiscus hyacinth lotus
        maple-leaf palm-tree potted-plant rose rosette seedling shamrock tulip white-flower wilted-flower""",
}
