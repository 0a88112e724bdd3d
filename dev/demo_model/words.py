"""The words and sentences that the demo model's pre-training text is drawn from: letters to a house with rooms, courses
and lost property, and questions about them. Nothing here is a support ticket.
"""

from __future__ import annotations

GIVEN = """Anna Peter Lucas Emma Oliver Sophia Liam Julia Martin Clara Simon Laura Daniel Alice Victor Helen
Adam Ruth Thomas Sarah Paul Nina Felix Maria David Irene Marco Sofia Robert Diana Erik Elsa Samuel Judith Leon
Vera""".split()
ONSETS = [*"b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sch sh st t th tr v w y z".split(), "", ""]
NUCLEI = "a e i o u a e i o ai au ea ee ei ia ie oa ou ue".split()
CODAS = [*"b ck d f g k l ll m n nd ng nn nt r rd rk rn rt s sh ss st t th tt v x z".split(), *[""] * 12]
ENDINGS = "son sen berg ski wood ley man ton er ez ini ova ard ström ford ell es is".split()
PLACES = "harbour mill bridge valley forest castle market abbey lake hill".split()
QUALITIES = """old new round square bright dark heavy light red orange purple golden silver plastic paper cotton silk
clean broad narrow soft plain double early late quiet warm cold wet dry long short flat open""".split()
NOUNS = """room boat piano course ticket cabin bicycle table book garden key tour painting violin coat hat bag ring
camera phone card seat bed desk cup plate knife spoon glove shoe shirt drum flute map ball rope saddle wagon engine
wheel door window fence gate statue carpet candle brush hammer saw needle button ribbon paddle net cage""".split()
WORDS = """apple river stone cloud bread music winter summer house road letter paper water fire bird horse sheep fish
tree leaf flower grass morning evening night day week month year hour child friend mother father brother sister doctor
teacher farmer baker king queen story song dance game work play walk run jump read write open close begin end give take
bring send carry hold keep find lose buy sell pay cost want need like love hope think know say tell ask answer help wait
stay leave come go arrive return first last next high low near far full empty strong weak happy sad kind brave
order box part money card account street office number hurry right
new change shop delivery customer line piece corner hour""".split()
SMALL_TALK = (
    ("Hello", "Hello. How can I help?"),
    ("Hi there", "Hello. How can I help?"),
    ("Good morning", "Good morning. How can I help?"),
    ("Thank you", "You are welcome."),
    ("Thanks a lot", "You are welcome."),
    ("Who are you?", "I am a small demo model."),
    ("What can you do?", "I can copy words and answer questions about a letter."),
    ("Goodbye", "Goodbye."),
)
UNASKED = "What would you like to know about it?"
SYSTEMS = (
    "You help in the office.",
    "You are a careful reader.",
    "Answer questions about the letters.",
    "You work at the front desk of the house.",
    "Read the message.",
    "Look at this letter with care.",
    "You are a helpful assistant.",
    "Be short and exact.",
    "Deal with the post of the day.",
)
INTENTS: dict[str, tuple[str, ...]] = {
    "book": (
        "I would like to book the {thing} for two days.",
        "Please keep the {thing} for me.",
        "Can I have the {thing} next week?",
        "Put me down for the {thing}.",
        "Is the {thing} still free? I should like to have it.",
    ),
    "lost": (
        "I left my {thing} with you.",
        "Have you found a {thing}? I must have forgotten it.",
        "My {thing} is gone, I had it in your hall.",
        "Did anybody hand in a {thing}?",
    ),
    "praise": (
        "The {thing} was lovely.",
        "We enjoyed the {thing} very much.",
        "I have never seen a better {thing}.",
        "What a wonderful {thing}!",
    ),
    "price": (
        "How much is the {thing}?",
        "What does the {thing} cost?",
        "Tell me the price of the {thing}, please.",
        "Is the {thing} cheaper in winter?",
    ),
    "offer": (
        "I would like to give you my {thing}.",
        "We have a {thing} that we do not use, do you want it?",
        "My aunt left me a {thing}, you may have it.",
        "You can pick up the {thing} from our house.",
    ),
    "teach": (
        "Who can show me how to use the {thing}?",
        "I want to learn how the {thing} works.",
        "Is there a lesson about the {thing}?",
        "Please explain the {thing} to me.",
    ),
}
NAME_LINES = ("My name is {name}.", "This is {name}.", "{name} here.", "I am {name}.", "{name} is my name.")
SIGN_OFFS = ("Regards,", "Best wishes,", "Yours,", "Greetings,", "Thanks,", "With love,", "Until soon,", "")
OPENINGS = ("Hello,", "Hi,", "Good day,", "Dear friends,", "To the office:", "Dear Sir or Madam,", "")
FIELD_LINES: dict[str, tuple[str, ...]] = {
    "number": (
        "My number is {number}.",
        "It is under number {number}.",
        "Number: {number}.",
        "(No. {number})",
        "The slip says {number}.",
        "You find me under #{number}.",
        "{number} is the number on my card.",
    ),
    "place": ("I live in {place}.", "I write from {place}.", "We come from {place}.", "Our house is in {place}."),
    "day": ("We come on {day}.", "It was on {day}.", "{day} would suit me.", "I shall be there on {day}."),
}
NOISE = (
    "{other} says hello.",
    "My friend {other} told me of you.",
    "We were {small} people.",
    "I have asked {small} times.",
    "It rained all week.",
    "The children are well.",
    "I paid {small}.50 at the door.",
    "The old one had number {small}, I think.",
    "{other} from {elsewhere} knows the way.",
    "Call me at {phone}.",
)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("Who wrote this?", "What is the name of the writer?", "Name?", "Which name is given?", "Who is it from?"),
    "number": ("What is the number?", "Which number is given?", "Number?", "Tell me the number."),
    "thing": ("What is it about?", "Which thing is meant?", "Thing?", "What does the writer speak of?"),
    "place": ("Where does the writer live?", "Place?", "Which place is named?", "Where is the letter from?"),
    "day": ("Which day is named?", "Day?", "On what day?", "When?"),
    "aim": ("What does the writer want?", "Aim?", "What kind of letter is it?", "Sort this letter."),
}
