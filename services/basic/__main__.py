"""`python -m services.basic`"""

from services.basic.app import main

main()
