"""Hints by someone who had not seen the rules of `kepo.tasks.leaks` and tried to break them.

``LEAKS`` and ``FAIR`` are his, lists of (name of a question, hint), with his labels, some hard or
open to doubt ("Bravo", "The healthy one"). The rules were then changed with these in view.
``OWN_LEAKS`` and ``OWN_FAIR`` say the like in other words. Who changed the rules wrote them before
he did, and changed none for them.
"""

from toy import example

QUESTIONS = {
    name: example(name, options=options, answer=answer)
    for name, options, answer in (
        ("chest", ("pneumonia", "normal lung", "pleural effusion", "tuberculosis"), "B"),
        ("nodules", ("4", "7", "9", "11"), "B"),
        ("yes", ("Yes", "No"), "A"),
        ("scan", ("MRI", "CT", "X-ray", "Ultrasound"), "B"),
        ("side", ("left", "right"), "B"),
        ("letters", ("A", "B", "C"), "C"),
        ("labelled", ("(A) one", "B. two"), "B"),
        ("size", ("12.5 mm", "1.25 cm", "12,5", "125"), "A"),
        ("chinese", ("肺炎", "正常"), "B"),
        ("russian", ("нормальное", "пневмония"), "A"),
        ("no", ("Yes", "No"), "B"),
        ("film", ("pneumonia", "normal lung", "effusion", "tuberculosis"), "B"),
        ("count", ("7", "8", "9"), "A"),
        ("lesion", ("benign", "malignant"), "B"),
        ("organ", ("Liver", "Heart", "Brain"), "A"),
    )
}


def _listed(tables: dict[str, str]) -> list[tuple[str, str]]:
    """(Name of the question, hint) of every cell; cells are parted by bars and line ends."""
    return [
        (name, hint)
        for name, table in tables.items()
        for line in table.strip().splitlines()
        for hint in line.split(" | ")
    ]


LEAKS = _listed(
    {
        "chest": """
La respuesta es B. | Die Antwort ist B | 答案是B | 答案：B | 答えはBです | Ответ: B
Respuesta: la segunda opción | réponse : B | The answer is в B | b | B | B. | «B» | „B“ | 【B】
（B） | B! | B… | \\boxed{B} | $\\boxed{\\text{B}}$ | \\textbf{B} | answer=B | ans:B
{"answer": "B"} | <answer>B</answer> | B = correct | B ✓ | ✅ B | → B | (the letter after A)
The letter between A and C | The second letter of the alphabet | Option two | Option #2
option no. 2 | 2nd option | the 2nd | The second one is right | Choose number 2
the one after the first | Second from the top | third from the bottom | Lung is normal
The lung appears normal | The lungs are normal. | normal-appearing lung | nomral lung
NORMAL_LUNG | n o r m a l  l u n g | normal  lung | nor\u00admal lung | n\u200bormal lung
ｎｏｒｍａｌ ｌｕｎｇ | 𝐧𝐨𝐫𝐦𝐚𝐥 𝐥𝐮𝐧𝐠 | Ⓑ
🅱 | The answer is 🅱\ufe0f | B as in Bravo | Bravo | Go with Bravo
beta | Not A, not C, not D. | It is neither pneumonia, pleural effusion nor tuberculosis
Exclude A, C and D | A, C, D are all wrong | Everything except B is wrong
All but B can be excluded | Only B remains | I'd bet on B | My vote: B
B is consistent with the image | B best matches | The image is consistent with normal lung.
Findings indicate normal lung | This rules in normal lung | Diagnosis: Normal lung
normal lung it is | Think of a normal lung
There is no pneumonia, no effusion and no tuberculosis. | It must be B because no opacity
Pick b. | Opt for (b) | Look at option B carefully | Consider B
Eliminate the other three; keep B | A✗ B✓ C✗ D✗ | A: no, B: yes, C: no, D: no | A) no B) yes
one of A or B, and it's not A | Either A or B; A has opacities, which are absent.
correct choice → b | B (normal lung) | answer B | The anwser is B | It's B | It’s B | it is 'B'
The answer is "normal lung" | The answer starts with N | first word normal
the correct option has the word normal | The option that says normal | The healthy one | option ii
Option II | roman numeral II | choose item (ii) | **Answer**: **B** | __B__ | ~~A~~ B | `B` | # B
- B | * B | 1. B | B) normal lung | B: normal | B- normal lung
Pneumonia can be excluded, so can effusion and TB. | Réponse B | Lösung: B | B es correcta
B est la bonne réponse | B ist richtig | B 是正确的 | 选B | 应选B | 정답은 B | الجواب B | תשובה: B
Antwort B | The solution is letter 'b' | Choice: B | correct answer (B) | So, B. | Thus B
Hence, option B. | Therefore the answer would be B | I would answer B here | B would be my choice
you should pick B | B seems likely | likely B | probably B | B, because the lungs are clear
Since the lungs are clear, B | the lungs are clear -> B | the lungs are clear (B)
the lungs are clear, i.e. B | the lungs are clear - B | the lungs are clear; B
The lungs are clear = B | as in B | as stated in B | matches B | see B | agree with B
""",
        "nodules": """
7 | seven | It's 7 | VII | The answer: 7.0 | 7.00 | sept | siete | 七 | 3+4 | 3 + 4 makes it
half of fourteen | one more than six | the prime between 5 and 11 | 7 is the sum
add 3 and 4 to get 7 | sum = 7 | 3+4=7 | 3 + 4 → 7 | 7! | so 7 | 00007 | 0x7 | +7 | 7. | (7)
there are 7 nodules | I count 7 | you'll see 7 nodules | the number of nodules is seven
number seven | 7 nodules | seven nodules are visible | result 7 | = 7 | 7 = 3 + 4 | 3 plus 4 is 7
It equals seven | add up to seven | the digits total seven | ends up being 7 | ７ | Ⅶ | ⑦
7\ufe0f⃣ | Option 7 | choose 7
""",
        "yes": """
Yes | yes. | Yes! | The answer is yes | yes, there is | Indeed there is one | affirmative | Sí
Oui | It is present | not no | No is wrong | Definitely yes | Say yes | yes because of opacity
Yes — an opacity | Y | true | the first | not B | The answer isn't no | Definitely yes.
Yes, definitely. | No is wrong. | No is not the answer. | The answer isn't no.
yes because of the opacity | Yes: an opacity is seen. | Yes — an opacity is seen.
Yes (an opacity is seen). | So yes. | So the answer: yes. | I would say yes. | Clearly yes
It cannot be no. | Not no. | Yes there is | Yes indeed
""",
        "scan": """
CT | computed tomography | C.T. | C T | It is a CT scan | CT-scan | CT image | ct | cT
a CAT scan | The modality is CT | This CT slice shows the liver | Look at the CT
In this CT image, bone is white | Hounsfield units | (CT) | CTs | the CT's window | CT/ | CT:
""",
        "side": """
right | on the right | It is on the right side | right side | right lung | R | the right one
dextral
""",
        "letters": """
C | The letter is C | It shows C
""",
        "labelled": """
two | It is two | B. two | (2)
""",
        "size": """
12.5 mm | It measures 12.5mm | 12.5 | = 12.5 mm | 12,5 mm
""",
        "chinese": """
正常 | 正常。 | 这是正常肺 | 正常です
""",
        "russian": """
Нормальное | нормальная
""",
        "no": """
Definitely no | No, there is none. | Surely not: no. | no because nothing is seen
No; nothing is seen.
""",
        "film": """
There is no pneumonia, no effusion and no tuberculosis.
No pneumonia. No effusion. No tuberculosis.
Pneumonia is absent, effusion is absent and tuberculosis is absent. | A: no, B: yes, C: no, D: no
A - wrong; B - right; C - wrong; D - wrong | A is wrong. C is wrong. D is wrong. | A✗ C✗ D✗
Lungs are normal. | The lung is normal | normal appearance of the lung
Neither pneumonia nor effusion nor tuberculosis is seen. | A, C and D do not fit.
Options A, C and D don't match. | It can't be A. It can't be C. It can't be D.
A fails, C fails, D fails. | The other three are wrong. | All options except the second are wrong
The answer is the same letter as in 'Bacon'. | Answer: B or not to be | 2 | 2. | II | Opt 2
option b | Answer=2 | second | Second! | go second | the middle-left option
The answer is between A and C. | Letter before C | the one before C | B>A | A<B | B beats A
prefer B to A | B rather than A | A is less likely than B | The correct answer is not A, C, D
All of A, C, D lack the sign | B has the sign described | B alone has the sign
Only the second option has the sign | B explains it | B describes what is seen
""",
        "count": """
7 = 3 + 4 | It ends up being 7 | seven of them are visible | You can count up to seven. | Count: 7
Count to 7 | There are exactly 7. | The picture has 7. | 7 in total | all 7 of them | the number 7
Seven.
""",
    }
)

FAIR = _listed(
    {
        "chest": """
A patient with clear lungs has no opacity. | Look at the costophrenic angles.
Compare the left and the right side. | Vitamin B deficiency does not show here.
Look for a meniscus at the base. | Ask whether the airspace is opaque.
A, B, C and D differ in where the opacity lies. | Hepatitis B is not visible.
Options differ in density. | Check for Kerley B lines.
First look at the apices, second at the bases. | There are two lungs; compare them.
Normal lungs have vessels to the periphery; is that so here? | What would a normal lung look like?
How does this differ from a normal lung? | Compare with a normal lung: are the markings symmetric?
Pneumonia shows consolidation; effusion shows a meniscus; a normal lung shows neither.
Contrast it with a normal lung. | In contrast to a normal lung, does the density change?
Is the picture normal or not? | Step 2: look at the bases. | Plan B: look at the hilum.
Point B marks the hilum. | Type B ultrasound. | B-mode image | A B-scan shows depth.
Blood group B | Zone B | Grade B image quality
Study the ABCDE approach: Airway, Breathing, Circulation. | The 2nd rib
The second rib is visible | Use the second image | the option that fits must explain the density
Rule out artefacts first. | Look at the B side of the film | Appendix B | class B
Figure B shows the lateral view. | panel B | B lines suggest fluid | E. coli
Is it A or B? Look at the opacity. | To tell A from B, look at the bases.
If opacity is seen, A; if not, B. | If there is a meniscus choose C, otherwise look at the apices.
Don't choose A too early | Is there tuberculosis? Look at the apices for cavities.
Tuberculosis favours the apices. | Pleural effusion blunts the angles.
Pneumonia is an infection. | Consider pneumonia only with opacity. | Look for signs of pneumonia.
Pneumonia and normal lung differ in opacity
pneumonia looks opaque, whereas normal lung looks black
Unlike pneumonia, normal lung is black on the film. | A normal lung is black on X-ray.
The normal lung is black; fluid is white. | Remember how a normal lung appears.
""",
        "nodules": """
the right digit is 7 | 0 + 7 | look at the 7 on the left | T7 vertebra | C7 | 7 mm slices
7T scanner | week 7 | at 7 o'clock | step 7 | page 7 | 7 and 0 | first digit 7, second 0
it is a 7 on the left | rib 7 | the seventh rib | 3 + 4 | COVID-19 | 7% | figure 7
""",
        "yes": """
No fluid? | Yes or no? | Is there, yes or no, an opacity? | Look for no more than one.
There is no rib fracture. | Ask: is it bright? If yes, look closer. | no cue is needed
""",
        "scan": """
MRI shows soft tissue, CT shows bone. | Bone is white in CT and X-ray. | Is it MRI or CT?
CT, MRI and ultrasound differ | A CT would show bone as white; is that so?
X-ray overlays structures
""",
        "side": """
right away look | that is right: look closely | the right answer needs care
Find the heart first; it is on the left of most people | look left and right
""",
        "lesion": """
Malignant lesions have irregular borders; benign ones are smooth. | Is the border irregular?
A benign lesion is round. | Irregular borders suggest a malignant lesion.
Malignant lesions often have irregular borders. | Think about what makes a lesion malignant.
Look for what distinguishes benign from malignant.
""",
        "organ": """
The liver lies on the right, the heart on the left. | Look below the diaphragm.
The liver is the largest organ; is it seen? | Compare the size of the liver to the heart.
""",
    }
)

OWN_LEAKS = _listed(
    {
        "chest": """
I'm certain it's B | B all the way | You cannot go wrong with B | B would be the wise choice
I rank B above A, C and D | I prefer B to the rest | B is preferable to C | B >> A | B > D > C > A
A < B | A is worse than B | B is more plausible than A, C or D | A no, B yes, C no, D no
A: false; B: true; C: false; D: false | A ✘, C ✘, D ✘ | A ❌ B ✅ C ❌ D ❌
A) wrong, C) wrong, D) wrong | (x) A (x) C (x) D | A, C and D are out
You can cross out A, C and D | Strike A, C and D | Forget A, C and D
A and C don't work, neither does D | A doesn't match; C doesn't match; D doesn't match
None of A, C, D matches the picture | Neither of A, C and D is supported
Everything but the second is wrong | All choices apart from B are wrong
All but the second option can be dismissed | Every option except B fails
The remaining three options are incorrect | The three others do not fit
The other options are all wrong | Pneumonia, effusion and tuberculosis do not fit here
Pneumonia is absent. Pleural effusion is absent. Tuberculosis is absent.
There is neither pneumonia, pleural effusion nor tuberculosis | The lung looks perfectly normal
Both lungs are normal | These lungs appear normal. | Lungs: normal.
the lung is entirely normal here | The answer is number 2 | Answer (2) | Solution: 2 | I choose 2
My answer: two | The correct answer is the 2nd | Answer: ② | Correct answer: ii
The solution is II. | Ⅱ | ② | 𝐁 | 𝓑 | 🄱 | 🅑 | The letter is 🄑
Ｔｈｅ ａｎｓｗｅｒ ｉｓ Ｂ | ᴮ | option ②
""",
        "yes": """
Certainly yes. | Obviously yes | Absolutely: yes | Yes, because a lesion is seen
Yes - it is there | Yes since there is an opacity | Yes; the sign is positive | yes without doubt
The reply is yes. | A clear yes | A definite yes | It's a yes from me | I'd go with yes
No is incorrect | "No" is false | No can be ruled out | The answer is not no | It's not a no
It isn't no | not "no" | You cannot say no here | Anything but no | Do not answer no
The correct reply is not "No". | Yes is correct | YES!!!
""",
        "no": """
Certainly no | Clearly no. | Obviously: no | No, as nothing is seen | No - nothing is there
No: there is no lesion. | No since the edges are sharp | no without doubt | Yes is wrong
Yes is incorrect. | The answer is not yes | It isn't yes | It cannot be yes | not yes | A clear no
Not a yes
""",
        "nodules": """
7 = 2 + 5 | Seven = 3 + 4 | It comes out as 7 | You end up with 7 | It turns out to be 7
It must be seven | The picture contains 7 | The image has seven | There are seven of these
Seven of these are visible | I can see seven. | seven in all | Altogether seven
You will arrive at 7 | This gives us Ⅶ | The count comes to seven | a total of seven
Count them: seven. | 7 ← the sum | ⑦. | ७ | 7\ufe0f⃣! | Answer: 七 | Option 2 | The second option
""",
        "scan": """
MRI, X-ray and ultrasound do not fit | It's neither MRI nor X-ray nor ultrasound
This is computed by CT | All except CT can be excluded | ＣＴ | CT > MRI
CT is better than MRI, X-ray and ultrasound
""",
        "lesion": """
Malignant. | The lesion is malignant | It is a malignant lesion. | This one is malignant
Not benign | Benign is wrong | Definitely malignant | It cannot be benign.
Malignant: the border is irregular. | Clearly malignant, as the border is irregular
""",
    }
)

OWN_FAIR = _listed(
    {
        "chest": """
What sets a normal lung apart from this one? | Is this how a normal lung looks?
Would a normal lung show these markings? | Do you see what you would expect in a normal lung?
How would pneumonia look here? | Compare it with a normal lung.
Recall what a normal lung looks like.
Compared with a normal lung, is the vessel pattern changed? | Contrast this with pneumonia.
Think about how tuberculosis presents. | Could this be tuberculosis?
Does anything here suggest an effusion? | Ask yourself whether pneumonia would look like this.
Check the A side and the B side of the film. | Look at side B.
Note the mark on the B edge of the film. | The B marker is on the wall.
Is B better than A? Measure first. | Rule out the option that needs fluid.
If the angle is blunt, choose C; otherwise keep looking.
If you see a cavity then D, else look at the base. | Two of the options need fluid.
The other options need fluid; is there any? | Eliminate three options by looking at the angle.
Page 2 has the legend. | Look at 2 places. | Two signs matter. | Are the lungs symmetric?
The lung fields must be compared side by side. | Normal findings at the apex do not settle it.
Is the heart normal in size beside the lung?
""",
        "yes": """
Say yes only if the border is sharp. | Is the answer yes or no? Measure it.
Yes or no: is there fluid? | If there is fluid, yes; if not, no. | There is no shortcut.
No matter what, look twice. | It cannot be seen without contrast. | Not every opacity is a lesion.
No more than a quick look is needed. | Yes would need fluid, no would need air.
The patient says no pain.
""",
        "nodules": """
about 7% of scans show this | 7 percent of cases | Use the 7 mm slice. | Slice 7 is sharpest.
Count in rows of 4. | The vertebra T7 is a landmark. | Are there more than 7? | Is it 7 or 9?
Between 4 and 9 there are two choices. | Count at least twice. | Start with the 4 at the top.
seven-day follow-up
""",
        "scan": """
How does CT differ from MRI? | Would a CT show bone like this? | Does a CT make slices?
Compare this to a CT. | What would ultrasound look like?
""",
        "lesion": """
What makes a lesion benign? | Consider what makes lesions malignant. | Is it benign or malignant?
How would a malignant border look? | Decide whether it is malignant.
Which features would a malignant lesion have? | Does a malignant lesion look like this?
Think of what a benign lesion looks like. | Remember the signs of malignant change.
""",
        "organ": """
Where does the liver lie? | Is this above or below the heart? | Is the liver larger than this?
Compare its size to the heart. | Think about where the brain is.
""",
    }
)
