"""The phrases from which the synthetic trajectories are built. Data only.

Places and institutions are invented. In the strings, `{place}`, `{goal}`, `{answer}` and the like are slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Strings = tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """A tool of the agent: its name, its parameter, and how its use is judged."""

    name: str
    parameter: str
    metrics: Mapping[str, str]
    """Score key of the category evaluation -> the question that the score answers."""


@dataclass(frozen=True)
class Topic:
    """A kind of question, and what each tool may find for it.

    `facts` names the function that draws the numbers (`trajectories.FACTS`). `calls` gives a precise and a loose
    argument for each tool.
    """

    family: str
    language: str
    facts: str
    things: Strings
    goal: str
    question: str
    calls: Mapping[str, tuple[str, str]]
    found: str
    partial: str


@dataclass(frozen=True)
class Phrasebook:
    """How the agent thinks and answers in one language, and what else it may find."""

    places: Strings
    irrelevant: Strings
    thoughts: Mapping[str, Strings]
    """Manner of the thought -> phrases. `again` goes with a repeated call, `assume` with no call."""
    closing: Mapping[str, Strings]
    """Standing of the final answer -> the last thought."""
    answers: Mapping[str, str]
    """Standing of the final answer -> the wording of the answer."""


ERRORS: Strings = ("Error: timeout after 30 s", "Error: access denied", "Error: not found", "Error: invalid input")
EMPTY: Strings = ("[]", "(nothing)")
"""What tools return, whatever the language of the task."""

TOOLS: Mapping[str, Tool] = {
    "web_search": Tool(
        name="search_web",
        parameter="query",
        metrics={
            "tool_use_quality": "apt calls?",
            "information_relevance": "fitting hits?",
            "goal_achievement": "progress?",
        },
    ),
    "browser": Tool(
        name="open_page",
        parameter="url",
        metrics={
            "tool_use_quality": "apt calls?",
            "content_extraction": "right passage?",
            "goal_achievement": "progress?",
        },
    ),
    "code": Tool(
        name="run_python",
        parameter="code",
        metrics={
            "tool_use_quality": "apt calls?",
            "code_quality": "right computation?",
            "goal_achievement": "progress?",
        },
    ),
    "files": Tool(
        name="read_file",
        parameter="path",
        metrics={
            "tool_use_quality": "apt calls?",
            "reading_accuracy": "right passage?",
            "goal_achievement": "progress?",
        },
    ),
}

TOPICS: tuple[Topic, ...] = (
    Topic(
        family="webshaper_qa",
        language="en",
        facts="year",
        things=("harbour museum", "city library", "cable car", "observatory", "botanical garden"),
        goal="the opening year of the {thing}",
        question="In which year did the {thing} of {place} open?",
        calls={
            "web_search": ("{thing} {place} opening year", "{place} sights"),
            "browser": ("https://{place}.example/{thing}/history", "https://{place}.example"),
        },
        found="History of the {thing}: it opened in {answer} and has been run by the town of {place} ever since.",
        partial="The {thing} of {place} was built around {about}; the exact year is not given.",
    ),
    Topic(
        family="webshaper_qa",
        language="en",
        facts="count",
        things=("zoo", "lighthouse", "open-air theatre", "railway museum"),
        goal="the number of visitors of the {thing}",
        question="How many visitors did the {thing} of {place} count in {year}?",
        calls={
            "web_search": ("{thing} {place} visitors {year}", "{thing} news"),
            "browser": ("https://{place}.example/{thing}/report-{year}", "https://{place}.example/blog"),
        },
        found="Report {year}: the {thing} of {place} counted {answer} visitors.",
        partial="Report {year}: about {about} visitors came to the {thing}; the exact number is missing.",
    ),
    Topic(
        family="webshaper_qa",
        language="en",
        facts="count",
        things=("bridge", "tunnel", "canal", "sea wall"),
        goal="the length of the {thing} in metres",
        question="How many metres long is the {thing} at {place}?",
        calls={
            "web_search": ("{thing} {place} length metres", "{thing} list"),
            "browser": ("https://{place}.example/{thing}/data", "https://{place}.example/travel"),
            "files": ("reports/{place}-{thing}.pdf", "reports"),
        },
        found="Technical data: the {thing} at {place} is {answer} metres long.",
        partial="The {thing} at {place} is said to be about {about} metres long; no source is named.",
    ),
    Topic(
        family="code_qa",
        language="en",
        facts="sum",
        things=("sum",),
        goal="the sum from {a} to {b}",
        question="What is the sum of all whole numbers from {a} to {b}?",
        calls={
            "code": ("print(sum(range({a}, {b} + 1)))", "print(numbers)"),
            "web_search": ("sum of whole numbers {a} to {b}", "sums"),
        },
        found="Output: {answer}",
        partial="Output: about {about}, the last numbers were left out",
    ),
    Topic(
        family="code_qa",
        language="en",
        facts="multiples",
        things=("multiples",),
        goal="the count of multiples of {a} up to {b}",
        question="How many whole numbers from 1 to {b} can be divided by {a}?",
        calls={
            "code": ("print({b} // {a})", "print(help)"),
            "web_search": ("count multiples of {a} up to {b}", "division"),
        },
        found="Output: {answer}",
        partial="Output: about {about}, only a part of the numbers was tried",
    ),
    Topic(
        family="file_qa",
        language="en",
        facts="count",
        things=("rent", "freight", "energy", "wages"),
        goal="the total of the column {thing}",
        question="What is the total of the column {thing} in {place}.csv?",
        calls={
            "files": ("data/{place}.csv", "notes.txt"),
            "code": ("print(read('data/{place}.csv')['{thing}'].sum())", "print(read('data'))"),
        },
        found="{place}.csv, column {thing}: total {answer}",
        partial="{place}.csv, column {thing}: about {about} so far, rows are missing at the end",
    ),
    Topic(
        family="file_qa",
        language="en",
        facts="year",
        things=("contract", "deed", "charter"),
        goal="the year of the {thing}",
        question="In which year was the {thing} of {place} signed?",
        calls={
            "files": ("archive/{place}/{thing}.txt", "archive/index.txt"),
            "web_search": ("{thing} of {place} signed year", "{place} archive"),
        },
        found="{thing} of {place}, signed and sealed in the year {answer}.",
        partial="{thing} of {place}, signed around {about}; the last digit cannot be read.",
    ),
    Topic(
        family="webshaper_qa",
        language="de",
        facts="year",
        things=("Sternwarte", "Seilbahn"),
        goal="das Jahr der Eröffnung",
        question="In welchem Jahr wurde die {thing} von {place} eröffnet?",
        calls={
            "web_search": ("{thing} {place} Eröffnung Jahr", "{place} Ausflug"),
            "browser": ("https://{place}.example/{thing}/chronik", "https://{place}.example"),
        },
        found="Chronik: Die {thing} von {place} wurde {answer} eröffnet.",
        partial="Die {thing} von {place} entstand um {about}; das genaue Jahr fehlt.",
    ),
    Topic(
        family="webshaper_qa",
        language="es",
        facts="count",
        things=("puente", "canal"),
        goal="la longitud en metros",
        question="¿Cuántos metros mide el {thing} de {place}?",
        calls={
            "web_search": ("{thing} {place} longitud metros", "{place} turismo"),
            "browser": ("https://{place}.example/{thing}/datos", "https://{place}.example"),
        },
        found="Datos técnicos: el {thing} de {place} mide {answer} metros.",
        partial="El {thing} de {place} mide cerca de {about} metros; falta la cifra exacta.",
    ),
    Topic(
        family="webshaper_qa",
        language="zh",
        facts="year",
        things=("图书馆", "天文台"),
        goal="开放年份",
        question="{place}{thing}是哪一年开放的？",
        calls={
            "web_search": ("{place}{thing} 开放年份", "{place} 旅游"),
            "browser": ("https://example/{place}/{thing}", "https://example"),
        },
        found="{place}{thing}于{answer}年开放。",
        partial="{place}{thing}大约建于{about}年，没有确切年份。",
    ),
    Topic(
        family="file_qa",
        language="ja",
        facts="count",
        things=("家賃", "運賃"),
        goal="{thing}の合計",
        question="{place}.csvの{thing}の合計はいくつですか。",
        calls={
            "files": ("data/{place}.csv", "メモ.txt"),
            "code": ("print(read('data/{place}.csv')['{thing}'].sum())", "print(read('data'))"),
        },
        found="{place}.csvの{thing}の合計は{answer}です。",
        partial="{place}.csvの{thing}は約{about}、最後の行がありません。",
    ),
    Topic(
        family="webshaper_qa",
        language="ar",
        facts="year",
        things=("مكتبة", "متحف"),
        goal="سنة الافتتاح",
        question="في أي سنة افتتح {thing} {place}؟",
        calls={
            "web_search": ("سنة افتتاح {thing} {place}", "سياحة {place}"),
            "browser": ("https://example/{place}/{thing}", "https://example"),
        },
        found="افتتح {thing} {place} في سنة {answer}.",
        partial="بني {thing} {place} حوالي سنة {about}، والسنة الدقيقة غير معروفة.",
    ),
)

PHRASEBOOKS: Mapping[str, Phrasebook] = {
    "en": Phrasebook(
        places=(
            *("Lindvale", "Osterau", "Brackmoor", "Karsund", "Velmont", "Ardenick", "Quillport", "Saltmere"),
            *("Hollowby", "Fenwater", "Greyhaven", "Mirrow"),
        ),
        irrelevant=(
            "Cheap hotels near the coast, book now.",
            "Recipes for plum cake and tea.",
            "Weather: mild, some rain.",
        ),
        thoughts={
            "planned": (
                "I need {goal}. The surest source names it directly, so I ask for exactly that and check it.",
                "The task turns on {goal}. First I ask the best source for it, then I compare.",
            ),
            "plain": (
                "I will look for {goal}.",
                "Next I try to get {goal}.",
            ),
            "vague": (
                "Not sure what is asked. Perhaps something turns up.",
                "I will just try anything and see.",
            ),
            "again": (
                "I will send the very same call once more.",
                "Let me do the same thing again.",
            ),
            "assume": (
                "I do not need any tool, I simply assume a number.",
                "Looking it up takes too long. I make up a value.",
            ),
        },
        closing={
            "right": (
                "The result states it plainly, and it fits the question.",
                "The figure is confirmed, so I answer.",
            ),
            "unchecked": ("One result names it. I did not check it.", "It is probably this one, I leave it unchecked."),
            "rough": ("Only a rough figure was found, so I give that.", "The exact value is missing, I round it."),
            "guess": ("Nothing was found, so I guess.", "I have no source and pick a number."),
            "unknown": ("I could not find out and give up.", "There is nothing that I could answer."),
        },
        answers={
            "right": "{answer}",
            "unchecked": "probably {answer}",
            "rough": "about {about}",
            "guess": "{wrong}",
            "unknown": "no answer",
        },
    ),
    "de": Phrasebook(
        places=("Osterau", "Lindenbruck", "Grauhafen"),
        irrelevant=("Rezepte für Pflaumenkuchen.", "Gebrauchtwagen, große Auswahl."),
        thoughts={
            "planned": ("Gesucht ist {goal}. Ich frage gezielt die beste Quelle und prüfe sie.",),
            "plain": ("Ich suche {goal}.",),
            "vague": ("Unklar, was gefragt ist. Ich probiere irgendetwas.",),
            "again": ("Ich mache denselben Aufruf noch einmal.",),
            "assume": ("Ich brauche kein Werkzeug und nehme eine Zahl an.",),
        },
        closing={
            "right": ("Das Ergebnis nennt es klar und passt zur Frage.",),
            "unchecked": ("Ein Ergebnis nennt es. Ich habe es nicht geprüft.",),
            "rough": ("Nur ein ungefährer Wert war zu finden.",),
            "guess": ("Nichts gefunden, also rate ich.",),
            "unknown": ("Ich konnte es nicht herausfinden.",),
        },
        answers={
            "right": "{answer}",
            "unchecked": "wohl {answer}",
            "rough": "etwa {about}",
            "guess": "{wrong}",
            "unknown": "keine Antwort",
        },
    ),
    "es": Phrasebook(
        places=("Villasol", "Puertolindo", "Montegris"),
        irrelevant=("Recetas de pescado.", "Hoteles baratos en la costa."),
        thoughts={
            "planned": ("Busco {goal}. Pregunto a la mejor fuente y lo compruebo.",),
            "plain": ("Voy a buscar {goal}.",),
            "vague": ("No sé bien qué se pide. Pruebo cualquier cosa.",),
            "again": ("Repito la misma llamada.",),
            "assume": ("No uso ninguna herramienta, supongo un número.",),
        },
        closing={
            "right": ("El resultado lo dice claramente.",),
            "unchecked": ("Un resultado lo nombra. No lo he comprobado.",),
            "rough": ("Solo hay un valor aproximado.",),
            "guess": ("No encontré nada, así que adivino.",),
            "unknown": ("No pude averiguarlo.",),
        },
        answers={
            "right": "{answer}",
            "unchecked": "quizás {answer}",
            "rough": "cerca de {about}",
            "guess": "{wrong}",
            "unknown": "sin respuesta",
        },
    ),
    "zh": Phrasebook(
        places=("临溪", "白沙岭", "青石湾"),
        irrelevant=("今日菜谱：鱼汤。", "本周天气：晴。"),
        thoughts={
            "planned": ("需要{goal}。我直接查最好的来源并核对。",),
            "plain": ("我来查{goal}。",),
            "vague": ("不清楚要找什么，随便试试。",),
            "again": ("再做一次同样的调用。",),
            "assume": ("不用工具，我假设一个数字。",),
        },
        closing={
            "right": ("结果写得很清楚，符合问题。",),
            "unchecked": ("有一个结果提到，我没有核对。",),
            "rough": ("只找到大概的数字。",),
            "guess": ("什么也没找到，只好猜。",),
            "unknown": ("我查不出来。",),
        },
        answers={
            "right": "{answer}",
            "unchecked": "可能是{answer}",
            "rough": "大约{about}",
            "guess": "{wrong}",
            "unknown": "没有答案",
        },
    ),
    "ja": Phrasebook(
        places=("青波", "白石町", "港丘"),
        irrelevant=("買い物：牛乳、パン。", "会議の記録：駐車場。"),
        thoughts={
            "planned": ("必要なのは{goal}です。最も確かな資料を調べて確認します。",),
            "plain": ("{goal}を調べます。",),
            "vague": ("何が必要か分からないので、適当に試します。",),
            "again": ("同じ呼び出しをもう一度します。",),
            "assume": ("道具を使わず、数字を仮定します。",),
        },
        closing={
            "right": ("結果にはっきり書いてあります。",),
            "unchecked": ("一つの結果にありますが、確認していません。",),
            "rough": ("およその値しかありません。",),
            "guess": ("何も見つからないので、推測します。",),
            "unknown": ("分かりませんでした。",),
        },
        answers={
            "right": "{answer}",
            "unchecked": "おそらく{answer}",
            "rough": "約{about}",
            "guess": "{wrong}",
            "unknown": "答えなし",
        },
    ),
    "ar": Phrasebook(
        places=("وادي النور", "رأس الرمل", "تل الزهر"),
        irrelevant=("وصفات الطعام.", "الطقس هذا الأسبوع."),
        thoughts={
            "planned": ("أحتاج إلى {goal}. أسأل أفضل مصدر ثم أتحقق.",),
            "plain": ("سأبحث عن {goal}.",),
            "vague": ("لا أعرف المطلوب، سأجرب أي شيء.",),
            "again": ("أكرر نفس الطلب مرة أخرى.",),
            "assume": ("لا أحتاج إلى أداة، أفترض رقما.",),
        },
        closing={
            "right": ("النتيجة واضحة وتجيب عن السؤال.",),
            "unchecked": ("نتيجة واحدة تذكره، ولم أتحقق.",),
            "rough": ("وجدت قيمة تقريبية فقط.",),
            "guess": ("لم أجد شيئا، لذلك أخمن.",),
            "unknown": ("لم أستطع معرفة ذلك.",),
        },
        answers={
            "right": "{answer}",
            "unchecked": "ربما {answer}",
            "rough": "حوالي {about}",
            "guess": "{wrong}",
            "unknown": "لا جواب",
        },
    ),
}
