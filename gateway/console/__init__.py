"""The console: pages over the functions of the API, for people, at `/ui`.

application                      aiohttp's side: who looks, which page, what a browser may do with it
pages                            which page is at which path; `event_pages`, `name_pages` … are the pages
asking                           what a page may ask of the API's functions
act_pages, forms                 commands
assets, frame                    templates and static files; what is around each page
text, figures, body_views, json_layout    how text, numbers, charts and bodies are shown
"""
