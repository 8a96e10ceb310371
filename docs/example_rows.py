"""One row of each data format, for the page of the formats; its test reads them all."""

CHOICE = {"question": "why did the boy pick up one present", "type": "CW"}
ROWS: dict[str, dict] = {
    "jsonl": {"video": "clip.mp4", "question": "How many people enter?", "kind": "number", "answer": 2},
    "seed_bench_r1": {
        "sample_id": 39, "video_source": "EpicKitchens", "task_goal": "Peel the onion", "question": "What should I do next?",
        "answer": "grab onion", "negative_answers": ["open drawer", "grab knife", "cut onion"], "task_progress_metadata": [],
        "current_observation_basename": "a.png"},
    "video_r1": {
        "problem_id": 2, "data_type": "video", "problem_type": "multiple choice", "problem": "What appears on the screen?",
        "options": ["A. A notification", "B. A command", "C. A warning", "D. A weather map"],
        "solution": "<answer>A</answer>", "path": "./videos/screen.mp4"},
    "longvideobench": {
        "id": "vid_0", "video_id": "vid", "video_path": "vid.mp4", "question": "What is on the table?",
        "candidates": ["a cup", "a plate", "a book", "a hat"], "correct_choice": 2, "duration": 473.0, "duration_group": 600},
    "nextgqa": {
        "video_id": "4882", "frame_count": 2697, "width": 640, "height": 480, **CHOICE, "answer": "unwrap it", "qid": "1",
        "a0": "share with the girl", "a1": "approach the lady", "a2": "unwrap it", "a3": "play with a train", "a4": "hide it"},
    "videochat_r1_gqa": {
        "id": "4882_1", "video": "1104/4882.mp4", **CHOICE, "duration": 90, "glue": [[13.8, 29.8]], "answer": "(C)",
        "options": ["(A) share with the girl", "(B) approach the lady", "(C) unwrap it", "(D) play with a train"]},
}
INTERVALS = {"4882": {"duration": 90, "location": {"1": [[13.8, 29.8]]}, "fps": 29.97}}  # gsub_<split>.json of nextgqa
